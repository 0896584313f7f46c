//! Threads for calls that can wait in the kernel: RESET, SETCONFIGURATION, SETINTERFACE, CLEAR_HALT, claims, streams,
//! DISCARDURB, and the close of a device.
//!
//! They are started before the process confines itself, because it cannot make threads afterwards. A device is worked
//! on by one lane at a time. With as many lanes as devices, no device ever waits for another one; a lane that sleeps
//! costs a kernel stack and two pages.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Barrier, Condvar, Mutex, MutexGuard, PoisonError};

use common::usbfs::UrbToken;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::error;

use super::link::{DeviceInfo, Handover, Link, Refused};
use crate::urb::{DeviceHandle, DeviceOp, OpError, OpId};

/// Stack of a lane. The deepest thing on it is a log line.
const STACK_BYTES: usize = 128 * 1024;

/// What a lane does with a device.
#[derive(Debug)]
pub(super) enum Work {
    /// Take a file.
    Open { fd: OwnedFd, handover: Handover },
    /// Cancel these, in this order.
    Discard(Vec<UrbToken>),
    /// Cancel these, then carry out the operation.
    Operate { id: OpId, op: DeviceOp, discard: Vec<UrbToken> },
    /// Cancel everything and close the file.
    Close,
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Outcome {
    Opened(Result<DeviceInfo, Refused>),
    Discarded,
    Operated(OpId, Result<(), OpError>),
    Closed,
}

/// A device on its way to a lane. The link is missing for `Open` only.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) device: DeviceHandle,
    pub(super) link: Option<Box<Link>>,
    pub(super) work: Work,
}

/// A device on its way back. The link is missing after `Closed` and a failed `Opened`.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) device: DeviceHandle,
    pub(super) link: Option<Box<Link>>,
    pub(super) outcome: Outcome,
}

/// Held by the event loop and every lane.
#[derive(Debug)]
struct Shared {
    /// Filled by the loop, emptied by the lanes.
    jobs: Mutex<Jobs>,
    wake: Condvar,
    /// Filled by the lanes, emptied by the loop.
    done: Mutex<Vec<Done>>,
    /// Tells the loop that `done` is not empty.
    ready: EventFd,
}

#[derive(Debug, Default)]
struct Jobs {
    queue: VecDeque<Job>,
    closed: bool,
}

/// The lanes, as the event loop holds them. Lanes end when this is dropped, each after what it is busy with.
#[derive(Debug)]
pub struct Lanes {
    shared: Arc<Shared>,
}

impl Lanes {
    /// Starts `count` threads: one for each port, so that a device never waits for another one. They inherit the
    /// signal mask and the confinement of the caller.
    pub fn start(count: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            jobs: Mutex::default(),
            wake: Condvar::new(),
            done: Mutex::default(),
            ready: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        });
        let lanes = Self { shared };
        // Each thread has been through everything that it does once only (the allocator asks the kernel how many
        // processors there are) before the caller closes the door.
        let started = Arc::new(Barrier::new(count.max(1) + 1));
        for index in 0..count.max(1) {
            let shared = Arc::clone(&lanes.shared);
            let started = Arc::clone(&started);
            std::thread::Builder::new().name(format!("lane-{index}")).stack_size(STACK_BYTES).spawn(
                move || {
                    std::hint::black_box(Box::new(index));
                    started.wait();
                    run(&shared);
                },
            )?;
        }
        started.wait();
        Ok(lanes)
    }

    /// Becomes readable when a lane is done with something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.ready.as_fd()
    }

    pub(super) fn send(&self, job: Job) {
        lock(&self.shared.jobs).queue.push_back(job);
        self.shared.wake.notify_one();
    }

    /// What has been done since the last call.
    pub(super) fn take_done(&self) -> Vec<Done> {
        // EAGAIN: nothing was signalled, and then there is nothing in the list either.
        let _ = self.shared.ready.read();
        std::mem::take(&mut *lock(&self.shared.done))
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        lock(&self.shared.jobs).closed = true;
        self.shared.wake.notify_all();
    }
}

/// What the mutexes guard is whole between any two statements, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lane's life.
fn run(shared: &Shared) {
    loop {
        let mut jobs = lock(&shared.jobs);
        let job = loop {
            if let Some(job) = jobs.queue.pop_front() {
                break job;
            }
            if jobs.closed {
                return;
            }
            jobs = shared.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        };
        drop(jobs);
        let done = carry_out(job);
        lock(&shared.done).push(done);
        if let Err(error) = shared.ready.write(1) {
            // The counter is full: the loop has been told 2^64 times already.
            error!(%error, "cannot wake the event loop");
        }
    }
}

fn carry_out(Job { device, link, work }: Job) -> Done {
    match (work, link) {
        (Work::Open { fd, handover }, _) => match Link::open(fd, &handover) {
            Ok((link, info)) => {
                Done { device, link: Some(Box::new(link)), outcome: Outcome::Opened(Ok(info)) }
            }
            Err(refused) => Done { device, link: None, outcome: Outcome::Opened(Err(refused)) },
        },
        (Work::Discard(tokens), Some(mut link)) => {
            link.discard(&tokens);
            Done { device, link: Some(link), outcome: Outcome::Discarded }
        }
        (Work::Operate { id, op, discard }, Some(mut link)) => {
            link.discard(&discard);
            let result = link.operate(&op);
            Done { device, link: Some(link), outcome: Outcome::Operated(id, result) }
        }
        (Work::Close, link) => {
            drop(link);
            Done { device, link: None, outcome: Outcome::Closed }
        }
        (Work::Operate { id, .. }, None) => {
            Done { device, link: None, outcome: Outcome::Operated(id, Err(OpError::Gone)) }
        }
        (Work::Discard(_), None) => Done { device, link: None, outcome: Outcome::Discarded },
    }
}
