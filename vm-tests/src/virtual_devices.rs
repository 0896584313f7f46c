//! Devices that live in the host under test: USB/IP devices ([`crate::usbip`]) and gadgets ([`crate::gadget`]), plugged
//! and pulled by a scenario.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::binaries;
use crate::guest::Guest;
use crate::host::Host;
use crate::log::Mark;
use crate::progress;
use crate::remote::{Process, Remote};

/// Enumeration on an emulated processor with its siblings busy; a fraction of a second elsewhere.
const ENUMERATED_WITHIN: Duration = Duration::from_secs(30);

/// From a plug in the host until a guest has the device, or from a pull until it has not.
const SEEN_WITHIN: Duration = Duration::from_secs(60);

/// An order is obeyed at once.
const OBEYED_WITHIN: Duration = Duration::from_secs(20);

/// A USB/IP device, plugged into `vhci_hcd` of the host under test. It is pulled when it is dropped.
pub struct UsbIpDevice {
    process: Process,
    name: String,
}

impl UsbIpDevice {
    /// Plugs a device of the catalogue in, with more arguments of `usbip-device`.
    pub fn plug(host: &Host, name: &str, arguments: &[&str]) -> Result<Self> {
        host.run("modprobe vhci_hcd")?;
        let argv: Vec<&str> = ["usbip-device", name].into_iter().chain(arguments.iter().copied()).collect();
        let process = host.spawn(&argv)?;
        process.log().wait("\"event\":\"plugged\"", ENUMERATED_WITHIN)?;
        progress(&format!("plugged USB/IP device {}", argv[1..].join(" ")));
        Ok(Self { process, name: name.to_owned() })
    }

    /// Waits until a kernel has configured it; its name below `/sys/bus/usb/devices` of the host.
    pub fn kernel_name(&self) -> Result<String> {
        let line = self.process.log().wait("\"event\":\"configured\"", ENUMERATED_WITHIN)?;
        let event: Value = serde_json::from_str(&line.text)?;
        event["device"].as_str().map(str::to_owned).with_context(|| format!("no name in {}", line.text))
    }

    /// Says a word to the device and waits until it has heard it.
    pub fn order(&self, words: &str) -> Result<Mark> {
        let before = self.process.log().here();
        self.process.write(format!("{words}\n").as_bytes())?;
        let line = self.process.log().wait_after(before, "\"event\":\"order\"", OBEYED_WITHIN)?;
        if line.text.contains("\"known\":false") {
            bail!("{} does not know the order {words:?}", self.name);
        }
        Ok(before)
    }

    /// What it has seen.
    pub fn statistics(&self) -> Result<Value> {
        let before = self.order("stats")?;
        let line = self.process.log().wait_after(before, "\"event\":\"stats\"", OBEYED_WITHIN)?;
        let mut event: Value = serde_json::from_str(&line.text)?;
        Ok(event["stats"].take())
    }

    /// Its process in the host.
    pub fn process(&self) -> &Process {
        &self.process
    }
}

impl Drop for UsbIpDevice {
    fn drop(&mut self) {
        let _ = self.process.signal(nix::sys::signal::Signal::SIGTERM);
    }
}

/// Plugs a gadget in: `function` and `speed` as the program `gadget` takes them, with further arguments.
pub fn plug_gadget(host: &Host, name: &str, function: &str, speed: &str, arguments: &str) -> Result<()> {
    host.run(&format!("gadget up {name} --function {function} --speed {speed} {arguments}"))?;
    progress(&format!("plugged gadget {name}: {function}, {speed} speed"));
    Ok(())
}

/// Pulls a gadget and forgets it.
pub fn remove_gadget(host: &Host, name: &str) -> Result<()> {
    host.run(&format!("gadget down {name}")).map(drop)
}

/// A shell condition: a device with this `vendor:product` is there. Busybox has no `lsusb`.
pub fn is_present(id: &str) -> String {
    let short: Vec<&str> = id.split(':').map(|number| number.trim_start_matches('0')).collect();
    format!("cat /sys/bus/usb/devices/*/uevent 2>/dev/null | grep -q '^PRODUCT={}/'", short.join("/"))
}

/// Waits until the kernel of a machine has a device with this `vendor:product` (or, with `!` before it, no longer has one).
pub fn wait_id(machine: &Remote, id: &str) -> Result<()> {
    let (negate, id) = id.strip_prefix('!').map_or(("", id), |id| ("! ", id));
    // A condition in braces, so that the negation is that of the whole pipeline.
    let script = format!("until {negate}{{ {}; }}; do busybox usleep 50000; done", is_present(id));
    let ended = machine.run_within(&script, SEEN_WITHIN);
    ended.map(drop).with_context(|| format!("waiting for {negate}{id}"))
}

/// Puts one of our programs into a running guest.
pub fn install(guest: &Guest, program: &str) -> Result<()> {
    let path = format!("/bin/{program}");
    guest.remote().write_file(&path, &binaries::stripped(&binaries::directory()?.join(program))?)?;
    guest.run(&format!("chmod +x {path}")).map(drop)
}
