//! VERSION: what the client says it can, what we say we can.
//!
//! The client's capabilities are checked and then ignored: we send it no file descriptors and no requests, and a read
//! reply is as long as the client asked for.

use nix::errno::Errno;
use serde::Deserialize;

use super::message::{MAX_DATA_XFER, MAX_FDS, VersionNumbers};
use crate::guest_memory::MAX_MAPS;

/// The only major version there is.
const MAJOR: u16 = 0;
/// The highest minor version we speak; nothing we use changed between 0.0 and 0.1.
const MINOR: u16 = 1;
/// Longest JSON that is looked at; both known clients send about 150 bytes.
const MAX_JSON: usize = 4096;
/// A client cannot use more descriptors in one message: `SCM_MAX_FD` of the kernel.
const CLIENT_FDS_LIMIT: u64 = 253;

#[derive(Debug, Default, Deserialize)]
struct Proposal {
    #[serde(default)]
    capabilities: Capabilities,
}

/// Only the types and ranges matter, hence the names that are never read.
#[derive(Debug, Default, Deserialize)]
struct Capabilities {
    max_msg_fds: Option<u64>,
    #[serde(rename = "max_data_xfer_size")]
    _max_data_xfer_size: Option<u64>,
    #[serde(rename = "max_dma_maps")]
    _max_dma_maps: Option<u64>,
    #[serde(rename = "pgsizes")]
    _pgsizes: Option<u64>,
    #[serde(rename = "write_multiple")]
    _write_multiple: Option<bool>,
    migration: Option<Migration>,
    #[serde(rename = "twin_socket")]
    _twin_socket: Option<TwinSocket>,
}

#[derive(Debug, Deserialize)]
struct Migration {
    pgsize: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct TwinSocket {
    #[serde(rename = "supported")]
    _supported: Option<bool>,
}

/// Answers a client that speaks `numbers` and sent `json` (with its NUL; empty for none): our numbers and our JSON
/// with NUL. An error means that the connection ends.
pub fn negotiate(numbers: VersionNumbers, json: &[u8]) -> Result<(VersionNumbers, Vec<u8>), Errno> {
    if numbers.major != MAJOR {
        return Err(Errno::EINVAL);
    }
    if !json.is_empty() {
        check(json)?;
    }
    let reply = VersionNumbers { major: MAJOR, minor: numbers.minor.min(MINOR) };
    Ok((reply, our_json()))
}

fn check(json: &[u8]) -> Result<(), Errno> {
    let text = json.strip_suffix(&[0]).ok_or(Errno::EINVAL)?;
    if text.len() > MAX_JSON {
        return Err(Errno::EINVAL);
    }
    let proposal: Proposal = serde_json::from_slice(text).map_err(|_| Errno::EINVAL)?;
    let capabilities = proposal.capabilities;
    if capabilities.max_msg_fds.is_some_and(|fds| fds > CLIENT_FDS_LIMIT) {
        return Err(Errno::EINVAL);
    }
    let page_size = capabilities.migration.and_then(|migration| migration.pgsize);
    if page_size.is_some_and(|size| size == 0 || size % 4096 != 0) {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

/// `capabilities` must be there: Cloud Hypervisor refuses a reply without it, and ignores what it holds. QEMU takes
/// `max_msg_fds` up to 16, `max_data_xfer_size` up to 64 MiB. No `write_multiple`: QEMU's flag for it collides with
/// its own queueing (`hw/vfio-user/device.h`).
fn our_json() -> Vec<u8> {
    let json = format!(
        "{{\"capabilities\":{{\"max_msg_fds\":{MAX_FDS},\"max_data_xfer_size\":{MAX_DATA_XFER},\
         \"max_dma_maps\":{MAX_MAPS},\"pgsizes\":4096}}}}\0"
    );
    json.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V0_1: VersionNumbers = VersionNumbers { major: 0, minor: 1 };

    fn refused(json: &str) -> bool {
        negotiate(V0_1, format!("{json}\0").as_bytes()) == Err(Errno::EINVAL)
    }

    #[test]
    fn reply_minor_is_the_lower_one() {
        for (theirs, ours) in [(0, 0), (1, 1), (7, 1)] {
            let (numbers, _) = negotiate(VersionNumbers { major: 0, minor: theirs }, b"").expect("accepted");
            assert_eq!(numbers, VersionNumbers { major: 0, minor: ours });
        }
    }

    #[test]
    fn other_major_is_refused() {
        assert_eq!(negotiate(VersionNumbers { major: 1, minor: 0 }, b""), Err(Errno::EINVAL));
    }

    #[test]
    fn json_without_nul_is_refused() {
        assert_eq!(negotiate(V0_1, b"{}"), Err(Errno::EINVAL));
    }

    #[test]
    fn broken_json_is_refused() {
        assert!(refused("{"));
        assert!(refused("\""));
        assert!(refused(""));
        assert!(refused("{}{}"));
        assert!(refused(&"[".repeat(4000)));
        assert!(refused(&" ".repeat(MAX_JSON + 1)));
    }

    #[test]
    fn capabilities_of_a_wrong_type_are_refused() {
        assert!(refused(r#"{"capabilities":"23"}"#));
        assert!(refused(r#"{"capabilities":{"max_msg_fds":"foo"}}"#));
        assert!(refused(r#"{"capabilities":{"max_msg_fds":-1}}"#));
        assert!(refused(r#"{"capabilities":{"max_msg_fds":254}}"#));
        assert!(refused(r#"{"capabilities":{"max_data_xfer_size":"1"}}"#));
        assert!(refused(r#"{"capabilities":{"migration":"23"}}"#));
        assert!(refused(r#"{"capabilities":{"migration":{"pgsize":"foo"}}}"#));
        assert!(refused(r#"{"capabilities":{"migration":{"pgsize":4095}}}"#));
        assert!(refused(r#"{"capabilities":{"twin_socket":{"supported":1}}}"#));
    }

    #[test]
    fn json_of_both_clients_is_accepted() {
        let cloud_hypervisor =
            r#"{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}"#;
        let qemu = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"pgsizes":4096,"max_dma_maps":65535,
            "migration":{"pgsize":4096,"max_bitmap_size":33554432},"write_multiple":true,"later":[]}}"#;
        for json in [cloud_hypervisor, qemu, "{}"] {
            assert!(!refused(json), "{json}");
        }
    }

    #[test]
    fn our_json_is_short_and_ends_in_nul() {
        let (_, json) = negotiate(V0_1, b"").expect("accepted");
        let text = json.strip_suffix(&[0]).expect("NUL");
        let value: serde_json::Value = serde_json::from_slice(text).expect("JSON");
        assert_eq!(value["capabilities"]["max_msg_fds"], MAX_FDS);
        assert!(value["capabilities"].get("write_multiple").is_none());
        assert!(json.len() < 256);
    }
}
