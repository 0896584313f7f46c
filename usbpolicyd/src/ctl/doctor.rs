//! `usbpolicyctl doctor`: what on this host keeps devices from VMs, each with the way out.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::unistd::{Uid, User};
use serde::Serialize;

use super::online::Socket;
use super::text::{WIDTH, escaped, wrapped};
use super::{Outcome, host};
use crate::admin::wire::{Reply, Request};
use crate::policy_files::Places;
use crate::topology::Half;

/// usbfs memory below which a few busy devices starve each other, in MiB. The kernel's default is 16.
const USBFS_MEMORY_MIB: u64 = 128;

/// Look for what keeps devices from VMs on this host, and say what to do
///
/// Exit status: 0 nothing found, 1 something to do.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    socket: Socket,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    /// Name of the check; never renamed.
    check: &'static str,
    /// Whether all is well.
    ok: bool,
    /// What was found, and what to do.
    text: String,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    findings: &'a [Finding],
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut findings = vec![landlock(), memory(), usbguard(), sysfs_service()];
    findings.extend(daemon(&args.socket));
    findings.push(policy());
    findings.extend(nodes());
    findings.extend(peers());
    if args.json {
        serde_json::to_writer_pretty(
            &mut *out,
            &Report { schema: "usbpolicyctl-doctor/1", findings: &findings },
        )?;
        writeln!(out)?;
    } else {
        for one in &findings {
            let mark = if one.ok { "ok  " } else { "TODO" };
            for (index, line) in wrapped(&escaped(&one.text), WIDTH - 6).iter().enumerate() {
                writeln!(out, "{}  {line}", if index == 0 { mark } else { "    " })?;
            }
        }
    }
    Ok(if findings.iter().all(|one| one.ok) { Outcome::Done } else { Outcome::Found })
}

fn found(check: &'static str, ok: bool, text: impl Into<String>) -> Finding {
    Finding { check, ok, text: text.into() }
}

fn landlock() -> Finding {
    let modules = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    match modules.split(',').any(|name| name.trim() == "landlock") {
        true => found("landlock", true, "the kernel has Landlock"),
        false if modules.is_empty() => {
            found("landlock", true, "cannot tell whether the kernel has Landlock (no /sys/kernel/security)")
        }
        false => found(
            "landlock",
            false,
            "the kernel has Landlock switched off: add it to the lsm= list on the kernel command line",
        ),
    }
}

fn memory() -> Finding {
    let path = "/sys/module/usbcore/parameters/usbfs_memory_mb";
    let text = fs::read_to_string(path).unwrap_or_default();
    match text.trim().parse::<u64>() {
        Ok(0) => found("usbfs-memory", true, "usbfs memory has no limit"),
        Ok(mib) if mib >= USBFS_MEMORY_MIB => found("usbfs-memory", true, format!("usbfs memory: {mib} MiB")),
        Ok(mib) => found(
            "usbfs-memory",
            false,
            format!(
                "usbfs memory for all devices of all VMs together is {mib} MiB: disks and cameras will wait for it. \
                 Put `options usbcore usbfs_memory_mb={USBFS_MEMORY_MIB}` into /etc/modprobe.d/usbcore.conf, or \
                 usbcore.usbfs_memory_mb={USBFS_MEMORY_MIB} on the kernel command line"
            ),
        ),
        Err(_) => found("usbfs-memory", false, format!("no USB in this kernel: {path} is not there")),
    }
}

/// Optional, so never something to do.
fn sysfs_service() -> Finding {
    let text = if Path::new(crate::sysfs_write::SOCKET).exists() {
        "usbpolicyd-sysfs.socket is there: devices can be taken back by their ports, and deauthorized"
    } else {
        "usbpolicyd-sysfs.socket is not there: devices cannot be taken back by their ports, nor deauthorized; \
         `systemctl enable --now usbpolicyd-sysfs.socket` changes that"
    };
    found("sysfs-service", true, text)
}

fn usbguard() -> Finding {
    if Path::new("/run/usbguard").exists() || Path::new("/run/usbguard.pid").exists() {
        let text = "USBGuard runs: it must allow a device before a VM can have it; such devices show as FAILED, \
                    waiting for authorization, until then";
        return found("usbguard", true, text);
    }
    found("usbguard", true, "USBGuard does not run")
}

fn daemon(socket: &Socket) -> Vec<Finding> {
    let status = match socket.call(&Request::Status) {
        Ok((replies, Ok(_))) => replies.into_iter().find_map(|reply| match reply {
            Reply::Status(view) => Some(view),
            _ => None,
        }),
        Ok((_, Err(text))) => return vec![found("daemon", false, text)],
        Err(error) => return vec![found("daemon", false, error.to_string())],
    };
    let Some(status) = status else { return vec![found("daemon", false, "usbpolicyd gives no answer")] };
    let mut findings =
        vec![found("daemon", true, format!("usbpolicyd {} runs: {}", status.program, status.status))];
    if status.mode != "normal" {
        let text =
            format!("usbpolicyd.mode={} is on the kernel command line: nothing is handed over", status.mode);
        findings.push(found("mode", false, text));
    }
    if !status.policy {
        let text =
            "no policy is loaded: nothing is handed over. `usbpolicyctl check` says what is wrong with it";
        findings.push(found("loaded", false, text));
    }
    if let Ok((replies, Ok(_))) = socket.call(&Request::Vms) {
        for reply in replies {
            let Reply::Vm(view) = reply else { continue };
            match view.problem {
                Some(problem) if view.up != Some(true) => {
                    findings.push(found("vm", false, format!("VM {}: {problem}", view.name)));
                }
                _ => {}
            }
        }
    }
    findings
}

fn policy() -> Finding {
    let sources = match Places::default().read() {
        Ok(sources) => sources,
        Err(error) => return found("policy", false, format!("{:#}", anyhow::Error::from(error))),
    };
    if sources.is_empty() {
        return found(
            "policy",
            false,
            "there is no policy yet: write /etc/usbpolicyd/policy.toml, see usbpolicyd.toml(5)",
        );
    }
    match crate::policy::load::load(&sources) {
        Ok(_) => found("policy", true, format!("the policy on disk can be used ({} files)", sources.len())),
        Err(problems) => {
            let text =
                format!("the policy on disk has {} errors; `usbpolicyctl check` shows them", problems.len());
            found("policy", false, text)
        }
    }
}

/// Whether usbpolicyd can open the device nodes.
fn nodes() -> Option<Finding> {
    let user = User::from_name("usbpolicyd").ok().flatten()?;
    let snapshot = host::this_host().ok()?;
    let denied = snapshot.devices.iter().filter(|device| {
        let path = format!("/dev/bus/usb/{:03}/{:03}", device.address.bus, device.address.device);
        let Ok(meta) = fs::metadata(path) else { return false };
        let is_owner = Uid::from_raw(meta.uid()) == user.uid && meta.mode() & 0o600 == 0o600;
        let is_group = meta.gid() == user.gid.as_raw() && meta.mode() & 0o060 == 0o060;
        !is_owner && !is_group && meta.mode() & 0o006 != 0o006
    });
    let names: Vec<&str> = denied.map(|device| device.sys_name.as_str()).collect();
    Some(if names.is_empty() {
        found(
            "nodes",
            true,
            format!("usbpolicyd may open the nodes of all {} devices", snapshot.devices.len()),
        )
    } else {
        let text = format!(
            "usbpolicyd may not open the nodes of {}: install 70-usbpolicyd.rules in /etc/udev/rules.d, then \
             `udevadm control --reload` and `udevadm trigger --subsystem-match=usb`",
            names.join(", ")
        );
        found("nodes", false, text)
    })
}

/// USB 3 ports whose USB 2 half the kernel does not know: there a socket has two names.
fn peers() -> Option<Finding> {
    let topology = host::this_host().ok()?.topology;
    let alone = topology.ports.iter().filter(|(port, known)| port.half == Half::Usb3 && known.peer.is_none());
    let names: Vec<String> = alone.map(|(port, _)| port.to_string()).collect();
    Some(if names.is_empty() {
        found("peers", true, "the kernel knows both halves of all USB 3 sockets")
    } else {
        let text = format!(
            "the kernel does not know the USB 2 half of {}: name both halves in one [connectors] table \
             (at = [\"…/usb2:N\", \"…/usb3:M\"])",
            names.join(", ")
        );
        found("peers", true, text)
    })
}
