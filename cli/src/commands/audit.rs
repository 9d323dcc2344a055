//! `audit`: who did what to projections.

use clap::Subcommand;
use kafold::projections::AuditVerification;
use serde_json::json;

use crate::admin::Context;
use crate::commands::projections::{Who, control};
use crate::error::Error;
use crate::event::time;
use crate::output::{count, or_dash};

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum AuditCommand {
    /// Shows the newest acts, newest first.
    List {
        /// Only of this projection.
        #[arg(long, value_name = "NAME")]
        projection: Option<String>,
        /// At most so many.
        #[arg(long, value_name = "N", default_value_t = 50)]
        limit: u32,
    },
    /// Checks the record for acts removed, altered or inserted outside of kafold.
    ///
    /// Exit code 1 after such a change, with the number of the row. A copy of the printed number
    /// and hash of the newest row, kept elsewhere, later proves all rows up to this row unchanged.
    Verify,
    /// Removes the oldest acts from the record and adds a row with their number and the reason.
    ///
    /// Nothing else is ever removed by age. Takes a reason.
    Prune {
        /// How many days an act stays on record.
        #[arg(long, value_name = "DAYS")]
        older_than: u32,
        #[command(flatten)]
        who: Who,
    },
}

pub(crate) async fn run(context: &mut Context, command: AuditCommand) -> Result<(), Error> {
    let control = control(context).await?;
    match command {
        AuditCommand::List { projection, limit } => {
            let acts = control.audit(projection.as_deref(), limit).await?;
            if context.out.json {
                return context.out.document(&acts);
            }
            let row = |act: &kafold::projections::AuditEntry| {
                let (projection, details) = (act.projection.clone(), act.details.clone());
                [
                    act.id.to_string(),
                    time(act.at),
                    act.actor.clone(),
                    act.action.clone(),
                    or_dash(projection),
                    or_dash(details),
                ]
            };
            let rows: Vec<_> = acts.iter().map(row).collect();
            context.out.table(["ROW", "AT", "WHO", "WHAT", "PROJECTION", "DETAILS"], &rows)
        }
        AuditCommand::Verify => verify(context, &control.verify_audit().await?),
        AuditCommand::Prune { older_than, who } => {
            let by = who.by_reason("to remove acts from the record")?;
            let before = context.clock.now() - chrono::TimeDelta::days(older_than.into());
            let pruned = control.prune(before, by).await?;
            match context.out.json {
                true => context.out.document(&json!({ "pruned": pruned })),
                false => context.out.line(&format!("{} removed", count(pruned, "act"))),
            }
        }
    }
}

fn verify(context: &mut Context, found: &AuditVerification) -> Result<(), Error> {
    if context.out.json {
        context.out.document(found)?;
    } else {
        let AuditVerification { rows, pruned_to, newest, newest_hash, .. } = found;
        let pruned = match pruned_to {
            0 => String::new(),
            last => format!(", those up to row {last} are pruned"),
        };
        let acts = count(*rows, "act");
        context
            .out
            .line(&format!("{acts} on record{pruned}; newest row {newest}, {newest_hash}"))?;
        for finding in &found.findings {
            context.out.line(&format!("  {finding}"))?;
        }
    }
    match found.findings.first() {
        None => Ok(()),
        Some(first) => Err(Error::failed(format!(
            "the record of acts was changed past kafold, {}: {first}",
            count(found.findings_total, "finding")
        ))),
    }
}
