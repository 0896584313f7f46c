//! usbpolicyd without guests: processes that only play `usbvfiod`, and what the host says of its devices.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::host::Host;
use crate::remote::Process;

/// Long enough for a machine that runs many virtual hosts at once; each wait ends as soon as it can.
pub const SHORT: Duration = Duration::from_secs(60);

/// A process that plays the usbvfiod of a VM, in this manner (see `play-instance`).
pub fn instance(host: &Host, vm: &str, manner: &[&str]) -> Result<Process> {
    let directory = format!("/run/usbvfiod/{vm}");
    let mut argv = vec!["play-instance", &directory];
    argv.extend(manner);
    let instance = host.spawn(&argv)?;
    instance.log().wait("listening", SHORT)?;
    host.run(&format!("chgrp usbpolicyd {directory}/policy.sock"))?;
    Ok(instance)
}

/// Waits until a shell condition holds in the host.
pub fn wait_until(host: &Host, condition: &str) -> Result<()> {
    let script = format!(
        "for i in $(seq 600); do if {condition}; then exit 0; fi; busybox usleep 100000; done; exit 1"
    );
    host.remote().run_within(&script, 2 * SHORT).with_context(|| {
        let list = host.run("usbpolicyctl list --long; usbpolicyctl log").unwrap_or_default();
        format!("waited for {condition}; now:\n{list}")
    })?;
    Ok(())
}

/// Waits until the host drives a device's only interface with `driver`; `none` for no driver.
pub fn wait_driver(host: &Host, name: &str, driver: &str) -> Result<()> {
    wait_until(
        host,
        &format!(
            "[ \"$(basename $(readlink /sys/bus/usb/devices/{name}:1.0/driver || echo none))\" = {driver} ]"
        ),
    )
}
