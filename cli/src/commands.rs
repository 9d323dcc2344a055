//! The commands, a module each.

mod acl;
mod audit;
mod clock;
mod doctor;
mod events;
mod grants;
mod index;
mod late;
mod lists;
mod migrate;
mod parked;
mod positions;
mod projections;
mod status;
mod stream;
mod top;
mod topic;
mod verify;

use clap::Subcommand;

use crate::admin::Context;
use crate::error::Error;

/// What an operator asks for.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Command {
    /// Shows log, stream index and projections on one screen.
    Status,
    /// Checks everything that a service needs, and says what to do about what is wrong.
    Doctor(doctor::DoctorArgs),
    /// Prints the rights that a role needs on Kafka.
    #[command(subcommand)]
    Acl(acl::AclCommand),
    /// Shows nodes, projections and partitions on the terminal, live, with rates; q ends.
    Top(top::TopArgs),
    /// Tells how projections stand, and has them paused, resumed, rebuilt.
    #[command(subcommand)]
    Projections(projections::ProjectionsCommand),
    /// Tells which streams are set aside because an event of theirs failed, and has them retried or skipped.
    #[command(subcommand)]
    Parked(parked::ParkedCommand),
    /// Shows the late events of a windowed model, and the grace that would take them in.
    #[command(subcommand)]
    Late(late::LateCommand),
    /// Shows the event time of windowed models, and moves it forward.
    #[command(subcommand)]
    Clock(clock::ClockCommand),
    /// Begins anew with a log that is not the one any more that positions in the database are of.
    #[command(subcommand)]
    Positions(positions::PositionsCommand),
    /// Tells who did what to projections, and whether the record of it is whole.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Folds the log again and compares: the stream index, and in a service's own program every read model.
    ///
    /// Exit code 1 when anything differs; the first differences are shown. Workers may run meanwhile.
    Verify,
    /// Makes the stream index again from the log.
    #[command(subcommand)]
    Index(index::IndexCommand),
    /// Shows one stream, or lists all.
    #[command(subcommand)]
    Stream(stream::StreamCommand),
    /// Lists the types of events.
    #[command(subcommand)]
    Types(lists::TypesCommand),
    /// Shows events of all streams.
    #[command(subcommand)]
    Events(events::EventsCommand),
    /// Exports the events of a log.
    #[command(subcommand)]
    Log(events::LogCommand),
    /// Prints which SQL rights a role needs.
    #[command(subcommand)]
    Grants(grants::GrantsCommand),
    /// Makes or checks the topics of a log on Kafka.
    #[command(subcommand)]
    Topic(topic::TopicCommand),
    /// Creates the toolkit's tables in the database, or makes them current.
    ///
    /// A service does the same at its start. Tables of a newer version are refused.
    Migrate,
}

pub(crate) async fn run(command: Command, context: &mut Context) -> Result<(), Error> {
    match command {
        Command::Status => status::run(context).await,
        Command::Doctor(args) => doctor::run(context, args).await,
        Command::Acl(command) => acl::run(context, command),
        Command::Top(args) => top::run(context, args).await,
        Command::Projections(command) => projections::run(context, command).await,
        Command::Parked(command) => parked::run(context, command).await,
        Command::Late(command) => late::run(context, command).await,
        Command::Clock(command) => clock::run(context, command).await,
        Command::Positions(command) => positions::run(context, command).await,
        Command::Audit(command) => audit::run(context, command).await,
        Command::Verify => verify::run(context).await,
        Command::Index(index::IndexCommand::Rebuild { partition }) => {
            index::rebuild(context, partition).await
        }
        Command::Stream(stream::StreamCommand::Show(args)) => stream::show(context, args).await,
        Command::Stream(stream::StreamCommand::List(args)) => lists::streams(context, args).await,
        Command::Types(lists::TypesCommand::List(args)) => lists::types(context, args).await,
        Command::Events(events::EventsCommand::Tail(args)) => events::tail(context, args).await,
        Command::Log(events::LogCommand::Export(args)) => events::export(context, args).await,
        Command::Grants(command) => grants::run(context, command),
        Command::Topic(topic::TopicCommand::Create) => topic::create(context).await,
        Command::Topic(topic::TopicCommand::Check) => topic::check(context).await,
        Command::Migrate => migrate::run(context).await,
    }
}
