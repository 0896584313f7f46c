//! What was decided and done, why and by whom: one line each for the log, one JSON object each for programs.
//!
//! The last entries are kept for `usbpolicyctl log`; `usbpolicyctl watch` gets each new one. Text of devices is escaped
//! before it comes here or is a JSON string, which escapes it.

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::time::{SystemTime, UNIX_EPOCH};

use common::ids::{DeviceId, VmName};
use serde::{Deserialize, Serialize};

/// Entries that are kept.
const KEPT: usize = 1024;
/// Where journald takes entries with fields.
const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";

/// The kinds of entries. The names are part of the output format and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A device was plugged in.
    Plugged,
    /// A device was pulled out.
    Unplugged,
    /// The policy decided.
    Decision,
    /// A VM got a device.
    Attached,
    /// A VM was found holding a device, after a restart of the daemon.
    Adopted,
    /// A VM no longer has a device.
    Detached,
    /// A hand-over failed.
    Failed,
    /// An instance does not let go of a device.
    Stuck,
    /// A device was cut off from whoever had it.
    Revoked,
    /// A device was released to the host, held or deauthorized.
    Released,
    /// An instance claims what it was never given.
    Foreign,
    /// The policy was loaded.
    PolicyLoaded,
    /// The policy was not loaded; the old one stays in force.
    PolicyRefused,
    /// An operator ordered something.
    Order,
    /// Events were lost; everything was read again.
    Overrun,
    /// The host slept; everything was read again.
    Resumed,
}

impl Kind {
    /// The name, as in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Plugged => "plugged",
            Self::Unplugged => "unplugged",
            Self::Decision => "decision",
            Self::Attached => "attached",
            Self::Adopted => "adopted",
            Self::Detached => "detached",
            Self::Failed => "failed",
            Self::Stuck => "stuck",
            Self::Revoked => "revoked",
            Self::Released => "released",
            Self::Foreign => "foreign",
            Self::PolicyLoaded => "policy-loaded",
            Self::PolicyRefused => "policy-refused",
            Self::Order => "order",
            Self::Overrun => "overrun",
            Self::Resumed => "resumed",
        }
    }

    /// journald's `MESSAGE_ID`: one for each kind, fixed for ever.
    fn message_id(self) -> String {
        format!("6f1c0a5e9d5b4d0c8a1e5b7c3f20{:04x}", 0x1000 + self as u16)
    }

    const fn is_warning(self) -> bool {
        matches!(self, Self::Failed | Self::Stuck | Self::Foreign | Self::PolicyRefused | Self::Overrun)
    }
}

/// The device that an entry is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Our name of the plug-in.
    pub id: DeviceId,
    /// The kernel's name, `3-9.1`.
    pub name: String,
    /// The socket, `pci-0000:00:14.0/usb2:9.1`.
    pub connector: String,
    /// `vvvv:pppp`.
    pub ids: String,
    /// Serial number, as the device sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Version of this format.
    pub version: u32,
    /// Counts up from 1 at each start of the daemon.
    pub seq: u64,
    /// Microseconds since 1970.
    pub time_us: u64,
    /// What.
    pub event: Kind,
    /// Which device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Subject>,
    /// Which VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// By which rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Why, or what exactly. For people.
    pub text: String,
    /// Who caused it: `kernel`, `policy`, `usbvfiod`, or an operator.
    pub actor: String,
}

/// The ring of entries and the way out to the log.
#[derive(Debug, Default)]
pub struct Audit {
    entries: VecDeque<Entry>,
    seq: u64,
    journal: Option<UnixDatagram>,
}

/// What an entry says, before it gets its number and time.
#[derive(Clone, Debug)]
pub struct Note {
    /// What.
    pub event: Kind,
    /// Which device.
    pub device: Option<Subject>,
    /// Which VM.
    pub vm: Option<VmName>,
    /// By which rule.
    pub rule: Option<String>,
    /// Why.
    pub text: String,
    /// Who.
    pub actor: String,
}

impl Audit {
    /// An empty one. With `journal`, entries go to journald with their fields, instead of the plain log.
    pub fn new(journal: bool) -> Self {
        let socket = journal.then(|| {
            let socket = UnixDatagram::unbound().ok()?;
            socket.set_nonblocking(true).ok()?;
            socket.connect(JOURNAL_SOCKET).ok()?;
            Some(socket)
        });
        Self { journal: socket.flatten(), ..Self::default() }
    }

    /// Adds an entry, logs it and returns it.
    pub fn add(&mut self, note: Note) -> &Entry {
        self.seq += 1;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let entry = Entry {
            version: 1,
            seq: self.seq,
            time_us: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
            event: note.event,
            device: note.device,
            vm: note.vm,
            rule: note.rule,
            text: note.text,
            actor: note.actor,
        };
        let sent = self.journal.as_ref().is_some_and(|socket| socket.send(&journal_packet(&entry)).is_ok());
        if !sent {
            let line = entry.line();
            if entry.event.is_warning() {
                tracing::warn!("{line}");
            } else {
                tracing::info!("{line}");
            }
        }
        if self.entries.len() == KEPT {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
        &self.entries[self.entries.len() - 1]
    }

    /// The entries that are kept, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// The number of the last entry.
    pub const fn last_seq(&self) -> u64 {
        self.seq
    }
}

impl Entry {
    /// The entry as one line of plain text.
    pub fn line(&self) -> String {
        let mut line = self.event.as_str().to_owned();
        if let Some(device) = &self.device {
            line += &format!(" {} {}", device.name, device.ids);
            if let Some(serial) = &device.serial {
                line += &format!(" SN {}", serial.escape_debug());
            }
            line += &format!(" at {}", device.connector);
        }
        if let Some(vm) = &self.vm {
            line += &format!(" vm {vm}");
        }
        if let Some(rule) = &self.rule {
            line += &format!(" rule {}", rule.escape_debug());
        }
        if !self.text.is_empty() {
            line += &format!(": {}", self.text);
        }
        line + &format!(" (by {})", self.actor)
    }
}

/// An entry in journald's own format: `KEY=value` lines, values with a line end in the binary form
/// (systemd's "Native Journal Protocol").
fn journal_packet(entry: &Entry) -> Vec<u8> {
    let priority = if entry.event.is_warning() { "4" } else { "6" };
    let mut fields = vec![
        ("MESSAGE", entry.line()),
        ("MESSAGE_ID", entry.event.message_id()),
        ("PRIORITY", priority.to_owned()),
        ("SYSLOG_IDENTIFIER", "usbpolicyd".to_owned()),
        ("USB_EVENT", entry.event.as_str().to_owned()),
        ("USB_ACTOR", entry.actor.clone()),
    ];
    if let Some(device) = &entry.device {
        fields.push(("USB_UID", device.id.to_string()));
        fields.push(("USB_DEVICE", device.name.clone()));
        fields.push(("USB_CONNECTOR", device.connector.clone()));
        fields.push(("USB_IDS", device.ids.clone()));
    }
    fields.extend(entry.vm.as_ref().map(|vm| ("USB_VM", vm.to_string())));
    fields.extend(entry.rule.as_ref().map(|rule| ("USB_RULE", rule.clone())));
    let mut packet = Vec::new();
    for (key, value) in fields {
        packet.extend(key.as_bytes());
        if value.contains('\n') {
            packet.push(b'\n');
            packet.extend((value.len() as u64).to_le_bytes());
        } else {
            packet.push(b'=');
        }
        packet.extend(value.as_bytes());
        packet.push(b'\n');
    }
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(rule: &str) -> Note {
        Note {
            event: Kind::Attached,
            device: Some(Subject {
                id: DeviceId(0x2a),
                name: "1-4".into(),
                connector: "pci-0000:00:14.0/usb2:4".into(),
                ids: "0781:5581".into(),
                serial: Some("A\u{1b}[2J".into()),
            }),
            vm: Some("work".parse().unwrap()),
            rule: Some(rule.into()),
            text: "guest port 3".into(),
            actor: "policy".into(),
        }
    }

    #[test]
    fn line_is_one_line_without_control_characters() {
        let mut audit = Audit::default();
        let line = audit.add(note("stick\nforged")).line();
        assert_eq!(
            line,
            "attached 1-4 0781:5581 SN A\\u{1b}[2J at pci-0000:00:14.0/usb2:4 vm work rule stick\\nforged: \
             guest port 3 (by policy)"
        );
    }

    #[test]
    fn journal_field_with_a_line_end_cannot_forge_another_field() {
        let mut audit = Audit::default();
        let packet = journal_packet(audit.add(note("x\nUSB_VM=other")));
        let marker = b"USB_RULE\n\x0e\0\0\0\0\0\0\0x\nUSB_VM=other\n";
        assert!(packet.windows(marker.len()).any(|part| part == marker));
    }

    #[test]
    fn old_entries_are_dropped() {
        let mut audit = Audit::default();
        for _ in 0..KEPT + 5 {
            audit.add(note("r"));
        }
        assert_eq!((audit.entries().count(), audit.entries().next().unwrap().seq), (KEPT, 6));
    }

    #[test]
    fn message_ids_are_32_hex_digits_and_differ() {
        let (one, other) = (Kind::Attached.message_id(), Kind::Detached.message_id());
        assert!(one.len() == 32 && one.bytes().all(|b| b.is_ascii_hexdigit()) && one != other);
    }
}
