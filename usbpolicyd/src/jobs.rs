//! The workers: threads for everything that can wait for a device, so that the daemon's loop never does.
//!
//! A job goes in by [`Workers::start`], its result comes out of [`Workers::finished`] after the event descriptor became
//! readable. One device has at most one job at a time (the broker sees to that) and one reading of its strings, so results
//! need no order.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use common::ids::DeviceId;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::broker::OnRelease;
use crate::claims::{Claims, Outcome, Plan};
use crate::facts::Strings;
use crate::strings::Order;
use crate::sysfs::{Present, read_strings};
use crate::usbnode::{NodeError, Nodes, Options, Ready};

/// Threads. Each stuck device keeps one of them for up to 5 s per call.
const THREADS: usize = 4;
/// Threads that read strings: so many new devices that hang in the host's drivers keep no other new device waiting, and
/// none keeps a device waiting that is known.
const READERS: usize = 4;

/// Something that can take long.
#[derive(Debug)]
pub enum Job {
    /// Make a device ready to be sent.
    Prepare(DeviceId, Box<Present>, Options),
    /// Do what its release asks; reset it before if so.
    Release(DeviceId, Box<Present>, OnRelease, bool),
    /// Cut it off from whoever has it: its port is switched off and on.
    Revoke(DeviceId, Box<Present>),
    /// Claim and release ports.
    Claim(Claims, Plan),
    /// Read the strings of a device.
    ReadStrings(Order),
}

/// How it ended.
#[derive(Debug)]
pub enum Done {
    /// Of [`Job::Prepare`].
    Prepared(DeviceId, Result<Ready, NodeError>),
    /// Of [`Job::Release`].
    Released(DeviceId, Result<(), NodeError>),
    /// Of [`Job::Revoke`].
    Revoked(DeviceId, Result<(), NodeError>),
    /// Of [`Job::Claim`].
    Claimed(Claims, Outcome),
    /// Of [`Job::ReadStrings`]; `None` when the device is gone.
    Strings(Order, Option<Strings>),
}

/// The threads and both ends of their queues.
pub struct Workers {
    jobs: mpsc::Sender<Job>,
    readings: mpsc::Sender<Job>,
    done: mpsc::Receiver<Done>,
    wake: Arc<EventFd>,
    /// Jobs whose result was not taken yet, and readings of strings.
    jobs_under_way: usize,
    readings_under_way: usize,
}

impl Workers {
    /// Starts them.
    pub fn new(nodes: &Nodes) -> io::Result<Self> {
        let (results, done) = mpsc::channel();
        // Shared with the workers, who write it when a result is there.
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let queue = |name: &str, threads: usize| -> io::Result<mpsc::Sender<Job>> {
            let (jobs, queue) = mpsc::channel();
            // Shared by the workers: each takes the next job from it.
            let queue = Arc::new(Mutex::new(queue));
            for number in 0..threads {
                let (queue, results, wake) = (Arc::clone(&queue), results.clone(), Arc::clone(&wake));
                let nodes = nodes.clone();
                thread::Builder::new()
                    .name(format!("{name}-{number}"))
                    .spawn(move || work(&nodes, &queue, &results, &wake))?;
            }
            Ok(jobs)
        };
        let (jobs, readings) = (queue("worker", THREADS)?, queue("reader", READERS)?);
        Ok(Self { jobs, readings, done, wake, jobs_under_way: 0, readings_under_way: 0 })
    }

    /// Hands a job to the next free worker.
    pub fn start(&mut self, job: Job) {
        let (queue, under_way) = match job {
            Job::ReadStrings(_) => (&self.readings, &mut self.readings_under_way),
            _ => (&self.jobs, &mut self.jobs_under_way),
        };
        *under_way = under_way.saturating_add(1);
        // The workers end only with us.
        let _ = queue.send(job);
    }

    /// Takes all results that are there.
    pub fn finished(&mut self) -> Vec<Done> {
        // Empty is normal: the results of two wakes may have been taken at the first.
        let _ = self.wake.read();
        let done: Vec<Done> = self.done.try_iter().collect();
        let readings = done.iter().filter(|done| matches!(done, Done::Strings(..))).count();
        self.readings_under_way = self.readings_under_way.saturating_sub(readings);
        self.jobs_under_way = self.jobs_under_way.saturating_sub(done.len().saturating_sub(readings));
        done
    }

    /// Whether anything is under way.
    pub const fn are_busy(&self) -> bool {
        self.jobs_under_way > 0 || self.readings_under_way > 0
    }

    /// Whether something is under way that changes a device or a port, and not only reads.
    pub const fn change_something(&self) -> bool {
        self.jobs_under_way > 0
    }
}

impl AsFd for Workers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// One thread: does jobs until nobody can send any more.
fn work(nodes: &Nodes, queue: &Mutex<mpsc::Receiver<Job>>, results: &mpsc::Sender<Done>, wake: &EventFd) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        if results.send(run(nodes, job)).is_err() {
            return;
        }
        // Fails only when the counter is full, and then it is readable.
        let _ = wake.write(1);
    }
}

fn run(nodes: &Nodes, job: Job) -> Done {
    match job {
        Job::Prepare(id, device, options) => Done::Prepared(id, nodes.prepare(&device, options)),
        Job::Release(id, device, how, reset) => {
            let result = match how {
                OnRelease::Host => nodes.give_back(&device, reset),
                OnRelease::Hold => Ok(()),
                OnRelease::Deauthorize => nodes.deauthorize(&device),
            };
            Done::Released(id, result)
        }
        Job::Claim(mut claims, plan) => {
            let outcome = claims.carry_out(nodes, &plan);
            Done::Claimed(claims, outcome)
        }
        Job::ReadStrings(order) => {
            let strings = read_strings(&order.plug);
            Done::Strings(order, strings)
        }
        Job::Revoke(id, device) => Done::Revoked(id, nodes.cycle_port(&device)),
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::sysfs::tests::Tree;

    #[test]
    fn workers_are_busy_until_their_results_are_taken() {
        let tree = Tree::new();
        tree.plug("1-1", 3);
        let device = tree.scan().devices.remove(0);
        let mut workers = Workers::new(&Nodes::default()).unwrap();
        assert!(!workers.are_busy() && workers.finished().is_empty());
        for number in 1..=3 {
            workers.start(Job::Release(DeviceId(number), Box::new(device.clone()), OnRelease::Hold, false));
        }
        let order = Order { plug: device.plug.clone(), authorized: true };
        workers.start(Job::ReadStrings(order));
        let mut taken = 0;
        while taken < 4 {
            assert!(workers.are_busy());
            poll(&mut [PollFd::new(workers.as_fd(), PollFlags::POLLIN)], PollTimeout::from(20_000_u16))
                .unwrap();
            taken += workers.finished().len();
        }
        assert!(!workers.are_busy() && !workers.change_something());
    }

    #[test]
    fn who_only_reads_changes_nothing() {
        let tree = Tree::new();
        tree.plug("1-1", 3);
        let plug = tree.scan().devices.remove(0).plug;
        let mut workers = Workers::new(&Nodes::default()).unwrap();
        workers.start(Job::ReadStrings(Order { plug, authorized: true }));
        assert!(workers.are_busy() && !workers.change_something());
    }
}
