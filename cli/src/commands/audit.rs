//! `audit`: who did what to projections.

use clap::Subcommand;
use serde_json::json;

use crate::admin::Context;
use crate::commands::projections::control;
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
    /// Removes acts from the record that are old. Nothing else is ever removed by age.
    Prune {
        /// How many days an act stays on record.
        #[arg(long, value_name = "DAYS")]
        older_than: u32,
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
                    time(act.at),
                    act.actor.clone(),
                    act.action.clone(),
                    or_dash(projection),
                    or_dash(details),
                ]
            };
            let rows: Vec<_> = acts.iter().map(row).collect();
            context.out.table(["AT", "WHO", "WHAT", "PROJECTION", "DETAILS"], &rows)
        }
        AuditCommand::Prune { older_than } => {
            let before = context.clock.now() - chrono::TimeDelta::days(older_than.into());
            let pruned = control.prune(before).await?;
            match context.out.json {
                true => context.out.document(&json!({ "pruned": pruned })),
                false => context.out.line(&format!("{} removed", count(pruned, "act"))),
            }
        }
    }
}
