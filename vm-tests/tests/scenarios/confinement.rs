//! What usbvfiod really calls while it takes a device, moves data and gives the device back, seen by `strace`.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use vm_tests::scenarios::Client;
use vm_tests::{Guest, HostConfig, UsbDevice, Usbpolicyd, Usbvfiod, progress, scenario};

const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "46f4:0001" }
"#;

/// The filter answers EPERM to what is not on its list, so a trace without EPERM has only listed calls in it; and
/// none of the calls that make files, sockets, processes or threads is there at all.
#[test]
fn attach_transfers_and_detach_need_only_listed_system_calls() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let _controller = Usbvfiod::start(host, "vm1")?;
        host.run("grep -q '^Seccomp:.*2$' /proc/$(pidof usbvfiod)/status")?;
        let strace = host.spawn(&["sh", "-c", "exec strace -f -o /tmp/trace -p $(pidof usbvfiod)"])?;
        strace.log().wait("attached", Duration::from_secs(30))?;

        let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
        let stick = host.plug(UsbDevice::stick("stick1"))?;
        guest.check_content(&stick)?;
        let before = guest.here();
        host.unplug(&stick)?;
        guest.wait_line_after(before, "USB disconnect", Duration::from_secs(60))?;
        guest.stop()?;

        strace.stop(Signal::SIGINT, Duration::from_secs(30))?;
        let trace =
            host.run("sed -E 's/^[0-9]+ +//; s/<\\.\\.\\. ([a-z0-9_]+) resumed>.*= /\\1(= /' /tmp/trace")?;
        let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
        for line in trace.lines() {
            ensure!(!line.contains("EPERM"), "a call was refused: {line}");
            if let Some((name, _)) = line.split_once('(') {
                *seen.entry(name).or_default() += 1;
            }
        }
        progress(&format!("system calls of usbvfiod: {seen:?}"));
        for needed in ["ioctl", "recvmsg", "sendmsg", "futex"] {
            seen.get(needed).with_context(|| format!("no {needed} in the trace: was anything traced?"))?;
        }
        for never in ["open", "openat", "socket", "connect", "bind", "execve", "clone", "clone3", "fork"] {
            ensure!(!seen.contains_key(never), "{never} was called");
        }
        Ok(())
    })
}
