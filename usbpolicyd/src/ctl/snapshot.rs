//! `usbpolicyctl snapshot`: the devices of this host, for bug reports and for trying policies elsewhere.

use std::collections::BTreeMap;
use std::io::Write;

use super::Outcome;
use super::host::MaybeLive;
use crate::facts::Snapshot;

/// Print the devices and ports of this host as JSON, for --devices of other verbs and for bug reports
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Replace serial numbers and what the host uses a device for; equal ones stay equal
    #[arg(long)]
    redact: bool,
    #[command(flatten)]
    host: MaybeLive,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut snapshot = args.host.read()?.snapshot;
    if args.redact {
        redact(&mut snapshot);
    }
    serde_json::to_writer_pretty(&mut *out, &snapshot)?;
    writeln!(out)?;
    Ok(Outcome::Done)
}

fn redact(snapshot: &mut Snapshot) {
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    for device in &mut snapshot.devices {
        if let Some(serial) = &mut device.serial {
            let next = known.len() + 1;
            let number = *known.entry(serial.clone()).or_insert(next);
            *serial = format!("serial-{number}");
        }
        for used in &mut device.host_use {
            used.why = format!("in use ({})", used.kind);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::tests::stick;
    use crate::facts::{HostUse, HostUseKind, HostUseLevel};
    use crate::topology::Topology;

    #[test]
    fn redacted_serials_are_gone_but_still_tell_devices_apart() {
        let mut other = stick("2");
        other.serial = Some("other".into());
        let why = "sda1 is mounted on /home/alice".to_owned();
        other.host_use.push(HostUse { kind: HostUseKind::Storage, level: HostUseLevel::Protected, why });
        let devices = vec![stick("1"), other, stick("3")];
        let mut snapshot = Snapshot { version: 1, topology: Topology::default(), devices };
        redact(&mut snapshot);
        let serials: Vec<_> = snapshot.devices.iter().map(|one| one.serial.as_deref().unwrap()).collect();
        assert_eq!(serials, ["serial-1", "serial-2", "serial-1"]);
        assert!(!serde_json::to_string(&snapshot).unwrap().contains("alice"));
    }
}
