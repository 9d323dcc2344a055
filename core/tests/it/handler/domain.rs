//! An account: enough rules to see which state a decision was taken on.

use std::sync::atomic::{AtomicBool, Ordering};

use kafold_core::clock::{IdGenerator, RandomIds};
use kafold_core::handler::HandleError;
use kafold_core::{Aggregate, CommandHandler, CommandId, DomainEvent, Handled, SnapshotSchema};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, DomainEvent)]
pub(crate) enum AccountEvent {
    #[event("account.deposited", version = 1)]
    Deposited { cents: u64 },
    #[event("account.withdrawn", version = 1)]
    Withdrawn { cents: u64 },
    #[event("account.closed", version = 1)]
    Closed,
    #[event("account.trapped", version = 1)]
    Trapped,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum AccountCommand {
    Deposit(u64),
    /// As many deposits of a cent.
    DepositCents(usize),
    Withdraw(u64),
    /// Once only.
    Close,
    /// Decides no events.
    Look,
    /// Panics in `decide`.
    PanicDeciding,
    /// Decides an event whose `evolve` panics while [`EVOLVE_PANICS`] is set.
    Trap,
    /// Is rejected with what cannot be written.
    Mumble,
    /// Is rejected with what would be read as another value.
    Waver,
    /// Cannot be written itself.
    #[serde(skip)]
    Mute,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum AccountError {
    #[error("the account has {0} cents")]
    Insufficient(u64),
    #[error("the account is closed")]
    Closed,
    #[error("wavered")]
    Wavered(Option<Option<u64>>),
    #[error("mumbled")]
    #[serde(skip)]
    Mumbled,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) cents: u64,
    pub(crate) closed: bool,
}

pub(crate) static EVOLVE_PANICS: AtomicBool = AtomicBool::new(false);

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    const SNAPSHOT: Option<SnapshotSchema<Self>> = Some(SnapshotSchema::new("account.1"));
    type Command = AccountCommand;
    type Event = AccountEvent;
    type Error = AccountError;

    fn decide(&self, command: &AccountCommand) -> Result<Vec<AccountEvent>, AccountError> {
        if self.closed && !matches!(command, AccountCommand::Look) {
            return Err(AccountError::Closed);
        }
        match *command {
            AccountCommand::Deposit(cents) => Ok(vec![AccountEvent::Deposited { cents }]),
            AccountCommand::DepositCents(count) => {
                Ok(vec![AccountEvent::Deposited { cents: 1 }; count])
            }
            AccountCommand::Withdraw(cents) if cents > self.cents => {
                Err(AccountError::Insufficient(self.cents))
            }
            AccountCommand::Withdraw(cents) => Ok(vec![AccountEvent::Withdrawn { cents }]),
            AccountCommand::Close => Ok(vec![AccountEvent::Closed]),
            AccountCommand::Look | AccountCommand::Mute => Ok(vec![]),
            AccountCommand::Mumble => Err(AccountError::Mumbled),
            AccountCommand::Waver => Err(AccountError::Wavered(Some(None))),
            AccountCommand::PanicDeciding => panic!("as told"),
            AccountCommand::Trap => Ok(vec![AccountEvent::Trapped]),
        }
    }

    fn evolve(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Deposited { cents } => self.cents += cents,
            AccountEvent::Withdrawn { cents } => self.cents -= cents,
            AccountEvent::Closed => self.closed = true,
            AccountEvent::Trapped => assert!(!EVOLVE_PANICS.load(Ordering::SeqCst), "as told"),
        }
    }
}

pub(crate) type Accounts = CommandHandler<Account>;
pub(crate) type Answer = Result<Handled, HandleError<AccountError>>;

pub(crate) fn new_command() -> CommandId {
    CommandId(RandomIds.event_id())
}

/// Handles a new command on the account `a`.
pub(crate) async fn handle(accounts: &Accounts, command: AccountCommand) -> Answer {
    accounts.handle("a", &command).await
}

/// The same in a task of its own.
pub(crate) fn spawn(
    accounts: &Accounts,
    command: AccountCommand,
) -> tokio::task::JoinHandle<Answer> {
    let accounts = accounts.clone();
    tokio::spawn(async move { handle(&accounts, command).await })
}

/// Checks the balance of account `a` by what it refuses to pay out.
pub(crate) async fn assert_balance(accounts: &Accounts, cents: u64) {
    match handle(accounts, AccountCommand::Withdraw(u64::MAX)).await {
        Err(HandleError::Rejected(AccountError::Insufficient(found))) => assert_eq!(found, cents),
        other => panic!("expected a rejection, found {other:?}"),
    }
}
