//! Network interfaces: the way to the default route, members of bonds and bridges, interfaces that are up.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::class_devices;
use crate::facts::{HostUse, HostUseKind, HostUseLevel};
use crate::sysfs::text;

/// Largest routing table that is read, in bytes. A host with a longer one is a router with its way out on no USB stick.
const ROUTES_MAX: usize = 1 << 20;
/// `IFF_UP` of `linux/if.h`.
const FLAG_UP: u64 = 1;
/// `RTF_UP` of `linux/route.h`.
const ROUTE_UP: u64 = 1;

/// One network interface.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) path: PathBuf,
    name: String,
    is_up: bool,
    has_carrier: bool,
    master: Option<String>,
    has_default_route: bool,
}

pub(super) fn read_links(sys: &Path, proc: &Path) -> Vec<Link> {
    let routed = default_routes(proc);
    let read = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.to_owned();
        let flags = text(&path, "flags")?;
        let flags = u64::from_str_radix(flags.trim().trim_start_matches("0x"), 16).ok()?;
        let master = fs::read_link(path.join("master")).ok();
        let master = master.and_then(|link| Some(link.file_name()?.to_str()?.to_owned()));
        Some(Link {
            is_up: flags & FLAG_UP != 0,
            // Reading it fails while the interface is down.
            has_carrier: text(&path, "carrier").is_some_and(|carrier| carrier.trim() == "1"),
            has_default_route: routed.contains(&name),
            master,
            name,
            path,
        })
    };
    class_devices(sys, "net").into_iter().filter_map(read).collect()
}

/// Interfaces with a default route, IPv4 or IPv6.
fn default_routes(proc: &Path) -> BTreeSet<String> {
    let list = |name: &str| {
        let mut list = fs::read_to_string(proc.join("1/net").join(name))
            .or_else(|_| fs::read_to_string(proc.join("net").join(name)))
            .unwrap_or_default();
        let end =
            list.char_indices().map(|(at, _)| at).take_while(|at| *at <= ROUTES_MAX).last().unwrap_or(0);
        if list.len() > ROUTES_MAX {
            list.truncate(end);
        }
        list
    };
    // Iface Destination Gateway Flags RefCnt Use Metric Mask …
    let four = list("route");
    let four = four.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let flags = u64::from_str_radix(words.get(3)?, 16).ok()?;
        (words[1] == "00000000" && words.get(7) == Some(&"00000000") && flags & ROUTE_UP != 0)
            .then(|| words[0].to_owned())
    });
    let mut found: BTreeSet<String> = four.collect();
    // Destination PrefixLength Source PrefixLength NextHop Metric RefCnt Use Flags Iface
    let six = list("ipv6_route");
    found.extend(six.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_default = words.first()?.bytes().all(|digit| digit == b'0') && words.get(1) == Some(&"00");
        let name = *words.get(9)?;
        (is_default && name != "lo").then(|| name.to_owned())
    }));
    found
}

impl Link {
    pub(super) fn host_use(&self) -> Option<HostUse> {
        let name = &self.name;
        let (kind, level, why) = if self.has_default_route {
            (HostUseKind::Network, HostUseLevel::Protected, format!("{name} carries the default route"))
        } else if let Some(master) = &self.master {
            let level = if self.is_up { HostUseLevel::Protected } else { HostUseLevel::Busy };
            let kind = if self.is_up { HostUseKind::Network } else { HostUseKind::NetDown };
            (kind, level, format!("{name} is part of {master}"))
        } else if self.is_up && self.has_carrier {
            (HostUseKind::Network, HostUseLevel::Busy, format!("{name} is up"))
        } else if self.is_up {
            (HostUseKind::NetDown, HostUseLevel::Busy, format!("{name} is set up, without a link"))
        } else {
            return None;
        };
        Some(HostUse { kind, level, why })
    }
}
