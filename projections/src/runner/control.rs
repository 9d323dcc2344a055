//! What operators ask, done between rounds: pause, resume, retry, skip; and the change of a
//! generation's role.

use kafold_core::Partition;

use super::{Ended, Role, Runner, until_asked};
use crate::desired::Desired;
use crate::reader::Reader;
use crate::registry::{self, State};

impl Runner {
    /// Waits until it is known what is asked: what is paused applies nothing after a restart either.
    pub(super) async fn hear(&mut self) -> Result<(), Ended> {
        let name = self.status.name().to_owned();
        self.context.look.notify_one();
        let known = async {
            if self.all_desired.wait_for(|all| all.contains_key(&name)).await.is_err() {
                // The handle is being dropped, and this with it.
                std::future::pending::<()>().await;
            }
        };
        until_asked(&mut self.shutdown, known).await
    }

    /// Looks at what is asked, if there is anything new, and does it.
    pub(super) async fn obey(&mut self, reader: &mut Reader) -> Result<(), Ended> {
        if !self.is_asked && !self.all_desired.has_changed().unwrap_or(false) {
            return Ok(());
        }
        self.is_asked = false;
        let desired = self.all_desired.borrow_and_update().get(self.status.name()).cloned();
        // A row that is gone asks for nothing.
        let Some(desired) = desired else { return Ok(()) };
        self.take_role(&desired)?;
        self.pause_or_resume(&desired, reader).await?;
        self.desired = Some(desired.clone());
        if self.is_paused {
            return Ok(());
        }
        for (generation, partition, stream) in &desired.retries {
            if *generation == self.generation {
                self.retry(*partition, stream).await?;
            }
        }
        Ok(())
    }

    fn take_role(&mut self, desired: &Desired) -> Result<(), Ended> {
        if desired.live == self.generation && self.role == Role::Next {
            self.role = Role::Live;
            self.status.promoted();
            tracing::info!(projection = self.status.name(), generation = self.generation.0, "live");
        }
        // What was looked up may be older than what this generation was begun with, not newer.
        let is_gone = self.role == Role::Next && desired.next != Some(self.generation);
        if desired.live > self.generation || is_gone { Err(Ended::Retired) } else { Ok(()) }
    }

    async fn pause_or_resume(
        &mut self,
        desired: &Desired,
        reader: &mut Reader,
    ) -> Result<(), Ended> {
        if desired.is_paused == self.is_paused {
            return Ok(());
        }
        self.is_paused = desired.is_paused;
        let held: Vec<Partition> = self.places.keys().copied().collect();
        if self.is_paused {
            reader.stop(held).await;
        } else {
            // Operators may have mended rows meanwhile.
            self.memory = None;
            for partition in held {
                if let Some(place) = self.places.get(&partition).cloned() {
                    self.start(reader, &place).await?;
                }
            }
        }
        self.goes_on();
        if self.role == Role::Live {
            self.tell_state().await?;
        }
        Ok(())
    }

    /// Writes down whether it runs or is paused.
    async fn tell_state(&mut self) -> Result<(), Ended> {
        let state = if self.is_paused { State::Paused } else { State::Running };
        let (database, now) = (self.context.database.clone(), self.context.clock.now());
        let name = self.status.name().to_owned();
        let tell = async || Ok(registry::set_state(&database, &name, state, None, now).await?);
        self.until_done(tell).await
    }
}
