//! A signal at a chosen system call of a daemon in the host, by `strace --inject`: the daemon dies or stops at exactly
//! that step, in the very program that is shipped, whatever the speed of the machine. Or a call that takes long.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use crate::host::Host;
use crate::remote::Process;

/// strace starts, and stops each thread once to take hold of it.
const ATTACHED_WITHIN: Duration = Duration::from_secs(60);

/// A step of a program: its `number`th call of `call`, counted from now on in each thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Name of the system call.
    pub call: &'static str,
    /// Counted from 1.
    pub number: u32,
}

/// Waits at a step of a program. Dropping it lets the program go on untouched.
pub struct Injection {
    strace: Process,
    program: String,
}

impl Injection {
    /// Takes hold of a running program and lets it get `signal` (`KILL`, `STOP`) at a step.
    pub fn new(host: &Host, program: &str, step: Step, signal: &str) -> Result<Self> {
        Self::inject(host, program, step.call, &format!("signal={signal}:when={}", step.number))
    }

    /// Takes hold of a running program and lets each such call begin only after so long.
    pub fn slow(host: &Host, program: &str, call: &str, by: Duration) -> Result<Self> {
        Self::inject(host, program, call, &format!("delay_enter={}", by.as_micros()))
    }

    fn inject(host: &Host, program: &str, call: &str, what: &str) -> Result<Self> {
        let pid = host.run(&format!("pidof -s {program}"))?;
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:{what}"));
        let strace = host.remote().spawn(&["strace", "-f", "-p", &pid, "-e", &trace, "-e", &inject])?;
        strace.log().wait("*attached*", ATTACHED_WITHIN)?;
        Ok(Self { strace, program: program.to_owned() })
    }

    /// Waits until the program has died or stopped there, or until `otherwise` holds; whether the step was reached.
    pub fn reached_before(&self, within: Duration, otherwise: impl Fn() -> Result<bool>) -> Result<bool> {
        const LOOK_AGAIN: Duration = Duration::from_millis(100);
        let deadline = Instant::now() + within;
        loop {
            if self.is_reached() {
                return Ok(true);
            }
            if otherwise()? {
                // Both may have happened since the look above.
                return Ok(self.is_reached());
            }
            ensure!(
                Instant::now() < deadline,
                "neither the step nor the end of {}:\n{}",
                self.program,
                self.strace.log().tail(40)
            );
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn is_reached(&self) -> bool {
        ["killed by SIGKILL", "stopped by SIGSTOP"]
            .iter()
            .any(|end| !self.strace.log().all_after(crate::Mark::START, end).is_empty())
    }

    /// Lets go of the program.
    pub fn release(self) -> Result<()> {
        if self.strace.is_running() {
            self.strace.stop(Signal::SIGTERM, Duration::from_secs(30))?;
        }
        Ok(())
    }
}
