//! The messages between `usbpolicyd` and `usbvfiod` (`docs/protocol.md`). Bytes to messages and back, no socket.
//!
//! One message is one JSON object in one packet of at most [`PACKET_MAX`] bytes, so that `strace` and a log show what
//! was said. Unknown fields are ignored (a newer peer may add some), unknown message types are an error.
//! What a message says about the device is information for log and guest; what usbvfiod acts on it reads from the file.

use serde::{Deserialize, Serialize};

use crate::ids::{BusAddress, DeviceId, PortChain, Speed, VendorProduct};

/// The version this build speaks. A peer that speaks another one is refused with a reason.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest packet in bytes, either way.
pub const PACKET_MAX: usize = 4096;

/// Most devices in one [`FromInstance::Devices`], so that it fits a packet.
pub const DEVICES_PER_PACKET: usize = 16;

/// Longest free text ([`FromInstance::Refused`], [`FromInstance::Gone`]) in bytes; longer text is cut.
pub const TEXT_MAX: usize = 512;

/// When a guest's reset of its port becomes a real reset of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetPolicy {
    /// Never. For devices that lose state the host put there.
    Never,
    /// Not at the first reset after the hand-over (the device is fresh), at each later one.
    #[default]
    FirstFree,
    /// At each one.
    Always,
}

/// All that usbvfiod cannot read from the file itself, or wants to log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Our name for this plug-in.
    pub id: DeviceId,
    /// Where the device was when it was opened; usbvfiod compares it with what the file says.
    pub address: BusAddress,
    /// Way from the root port to the device on the host.
    pub path: PortChain,
    /// Speed on the host.
    pub speed: Speed,
    /// Vendor and product.
    pub ids: VendorProduct,
    /// `bConfigurationValue` that is active, 0 for none.
    pub configuration: u8,
    /// What a guest's port reset does.
    #[serde(default)]
    pub reset: ResetPolicy,
}

/// From usbpolicyd to usbvfiod. `Attach` travels with exactly one fd, all others with none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToInstance {
    /// First message of a connection.
    Hello {
        /// [`PROTOCOL_VERSION`] of the sender.
        version: u32,
    },
    /// Take this device. Answer: `Attached` or `Refused`.
    Attach(Attach),
    /// Give this device back. Answer: `Detached`, also when it is not there.
    Detach {
        /// Which one.
        id: DeviceId,
        /// After so long usbpolicyd takes stronger means.
        deadline_ms: u32,
    },
    /// Which devices do you have? Answer: `Devices`, in order of id, those after `after`.
    List {
        /// Last id of the page before.
        #[serde(default)]
        after: Option<DeviceId>,
    },
    /// Are you there? Answer: `Pong`.
    Ping {
        /// Comes back.
        nonce: u64,
    },
}

/// Why a device was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusedCode {
    /// The file is no usbfs node, or not opened for reading and writing.
    BadFile,
    /// The file is another device than the message says.
    WrongDevice,
    /// This id is attached already.
    DuplicateId,
    /// No free port of the right speed.
    NoPort,
    /// The device cannot be served: descriptors, speed, a claim that failed.
    Unusable,
    /// A limit of this process.
    NoResources,
}

/// One attached device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedDevice {
    /// Name given in `Attach`.
    pub id: DeviceId,
    /// Guest root port, 1 and up.
    pub port: u8,
    /// As the file says.
    pub address: BusAddress,
    /// As the file says.
    pub path: PortChain,
}

/// Counters since start. Totals over all devices of the instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Devices attached now.
    pub devices: u32,
    /// Transfers completed, whatever the outcome.
    pub transfers: u64,
    /// Payload bytes from devices.
    pub bytes_in: u64,
    /// Payload bytes to devices.
    pub bytes_out: u64,
    /// Transfers that ended with an error.
    pub errors: u64,
    /// Times a transfer had to wait because the host's usbfs memory was used up.
    pub waits_for_memory: u64,
}

/// From usbvfiod to usbpolicyd. Never with an fd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromInstance {
    /// Answer to `Hello`.
    Hello {
        /// [`PROTOCOL_VERSION`] of the sender.
        version: u32,
        /// Root ports for low, full and high speed.
        usb2_ports: u8,
        /// Root ports for SuperSpeed.
        usb3_ports: u8,
        /// Whether a VMM is connected.
        vmm_connected: bool,
    },
    /// The device hangs on a guest port.
    Attached {
        /// Which one.
        id: DeviceId,
        /// Guest root port, 1 and up.
        port: u8,
    },
    /// The device was not taken; its file is closed.
    Refused {
        /// Which one.
        id: DeviceId,
        /// Why, for programs.
        code: RefusedCode,
        /// Why and what to do, for people.
        text: String,
    },
    /// The device's file is closed.
    Detached {
        /// Which one.
        id: DeviceId,
    },
    /// Answer to `List`.
    Devices {
        /// A page of them, by id.
        devices: Vec<AttachedDevice>,
        /// There are more after the last of these.
        more: bool,
    },
    /// Unasked: the device is gone and its file closed.
    Gone {
        /// Which one.
        id: DeviceId,
        /// What was seen.
        text: String,
    },
    /// Unasked: the guest reset the device. On failure the device is about to be `Gone`.
    ResetDone {
        /// Which one.
        id: DeviceId,
        /// Whether it is the same device afterwards.
        ok: bool,
    },
    /// Answer to `Ping`, with counters.
    Pong {
        /// As in `Ping`.
        nonce: u64,
        /// Counters since start.
        stats: Stats,
    },
    /// The peer's message was not understood or not allowed; the sender of this closes the connection.
    Error {
        /// Why and what to do.
        text: String,
    },
}

/// A packet is not a message, or a message does not fit a packet.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Longer than [`PACKET_MAX`].
    #[error("message of {len} bytes is longer than the limit of {PACKET_MAX}")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// Not JSON, or not one of the messages.
    #[error("packet of {len} bytes is not a message of protocol version {PROTOCOL_VERSION}")]
    NotAMessage {
        /// Its length.
        len: usize,
        /// What the parser says.
        source: serde_json::Error,
    },
}

/// Makes the packet of a message.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, WireError> {
    let packet = serde_json::to_vec(message).map_err(|source| WireError::NotAMessage { len: 0, source })?;
    match packet.len() {
        len if len > PACKET_MAX => Err(WireError::TooLong { len }),
        _ => Ok(packet),
    }
}

/// Reads the message of a packet.
pub fn decode<M: for<'de> Deserialize<'de>>(packet: &[u8]) -> Result<M, WireError> {
    let len = packet.len();
    if len > PACKET_MAX {
        return Err(WireError::TooLong { len });
    }
    serde_json::from_slice(packet).map_err(|source| WireError::NotAMessage { len, source })
}

/// Cuts free text to [`TEXT_MAX`] bytes at a character border.
pub fn cut_text(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        let mut end = TEXT_MAX;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attached(id: u64) -> AttachedDevice {
        AttachedDevice {
            id: DeviceId(id),
            port: 255,
            address: BusAddress { bus: u32::MAX, device: u32::MAX },
            path: "255.255.255.255.255.255.255".parse().unwrap(),
        }
    }

    #[test]
    fn a_full_page_of_devices_fits_a_packet() {
        let devices = (0..DEVICES_PER_PACKET as u64).map(|n| attached(u64::MAX - n)).collect();
        assert!(encode(&FromInstance::Devices { devices, more: true }).is_ok());
    }

    #[test]
    fn a_refusal_with_the_worst_text_fits_a_packet() {
        // The worst character costs six bytes as JSON (\u001f) for each byte of text.
        let text = cut_text("\u{1f}".repeat(5000));
        assert_eq!(text.len(), TEXT_MAX);
        let refused = FromInstance::Refused { id: DeviceId(u64::MAX), code: RefusedCode::NoResources, text };
        assert!(encode(&refused).is_ok());
    }

    #[test]
    fn text_is_cut_at_a_character_border() {
        let text = cut_text("é".repeat(TEXT_MAX));
        assert_eq!(text.len(), TEXT_MAX);
        assert!(cut_text(format!("a{}", "é".repeat(TEXT_MAX))).len() < TEXT_MAX);
    }

    #[test]
    fn messages_look_like_this_on_the_wire() {
        let attach = ToInstance::Attach(Attach {
            id: DeviceId(77),
            address: BusAddress { bus: 3, device: 9 },
            path: "9.1".parse().unwrap(),
            speed: Speed::SuperPlus,
            ids: "0781:5581".parse().unwrap(),
            configuration: 1,
            reset: ResetPolicy::FirstFree,
        });
        let text = String::from_utf8(encode(&attach).unwrap()).unwrap();
        assert_eq!(
            text,
            r#"{"type":"attach","id":77,"address":{"bus":3,"device":9},"path":"9.1","speed":"super-plus","ids":"0781:5581","configuration":1,"reset":"first-free"}"#
        );
        assert_eq!(decode::<ToInstance>(text.as_bytes()).unwrap(), attach);
    }

    #[test]
    fn a_newer_peers_extra_field_is_ignored_and_its_new_message_refused() {
        let ping = br#"{"type":"ping","nonce":1,"colour":"red"}"#;
        assert_eq!(decode::<ToInstance>(ping).unwrap(), ToInstance::Ping { nonce: 1 });
        assert!(matches!(decode::<ToInstance>(br#"{"type":"dance"}"#), Err(WireError::NotAMessage { .. })));
    }

    #[test]
    fn an_over_long_packet_is_refused_before_it_is_parsed() {
        assert!(matches!(decode::<ToInstance>(&[b' '; PACKET_MAX + 1]), Err(WireError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn no_packet_panics(packet in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = decode::<ToInstance>(&packet);
            let _ = decode::<FromInstance>(&packet);
        }
    }
}
