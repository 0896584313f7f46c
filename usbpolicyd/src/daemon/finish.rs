//! The end of the daemon: what it has begun at devices is brought to its end.

use std::time::Duration;

use super::{Daemon, StartError, now};
use crate::broker::State;

/// At the end, what is being done at devices has so long; a request of a driver ends after 5 s, and systemd kills us after
/// 10 s (`TimeoutStopSec=`).
const END_PATIENCE_DEVICES: Duration = Duration::from_secs(8);
/// And an instance that ends just then so long until it is known to be gone.
const END_PATIENCE_INSTANCES: Duration = Duration::from_millis(500);

impl Daemon {
    /// What a VM gave up before we were told to end, its device is given back to the host's drivers first: nobody else would
    /// until we are started again. A second signal, or a device that hangs, ends this.
    pub(super) fn finish(&mut self) -> Result<(), StartError> {
        self.ending = false;
        let begun = now();
        loop {
            let so_far = now().saturating_sub(begun);
            let limit = if self.workers.change_something() {
                END_PATIENCE_DEVICES
            } else if self.instances.are_unsure() {
                END_PATIENCE_INSTANCES
            } else {
                return Ok(());
            };
            let left = limit.saturating_sub(so_far);
            if left.is_zero() || self.ending {
                if self.workers.change_something() {
                    let devices = self.unfinished();
                    tracing::warn!(
                        devices,
                        "ending before they answer; the next start gives them back, or plug them in again"
                    );
                }
                return Ok(());
            }
            let due = self.instances.deadline().map_or(left, |at| at.saturating_sub(now()));
            self.wait_and_handle(left.min(due))?;
            let inputs = self.instances.tick(now());
            self.queue(inputs);
            self.pump();
        }
    }

    /// Kernel names of the devices that are neither with the host nor with a VM, for the log.
    fn unfinished(&self) -> String {
        let is_between =
            |id| matches!(self.broker.state(now(), id), Some(State::Releasing | State::Attaching(_)));
        let between = self.inventory.iter().filter(|(id, _)| is_between(*id));
        between.map(|(_, item)| item.present.facts.sys_name.as_str()).collect::<Vec<_>>().join(", ")
    }
}
