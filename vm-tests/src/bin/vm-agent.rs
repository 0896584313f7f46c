//! `vm-agent init`: process 1 of a machine under test, after its start script. `vm-agent serve`: its child that talks to the test.

use anyhow::{Result, bail};

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("serve") => vm_tests::agent::serve(),
        Some("init") => {
            let ended = vm_tests::agent::reap_until_served();
            println!("vm-agent: the test has gone ({ended:?}), power off");
            // Process 1 must not return: the kernel would panic before the power goes.
            let error = std::process::Command::new("/bin/busybox").args(["poweroff", "-f"]).status();
            bail!("cannot power off: {error:?}")
        }
        _ => bail!("usage: vm-agent init|serve"),
    }
}
