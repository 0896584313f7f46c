//! The policy as the operator wrote it: each table and key of the language, with the place it stands at.
//!
//! Values are typed and checked one by one. What the names in it refer to is [`super::load`]'s business; what it means
//! for a device is [`super::compile`]'s.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use common::ids::{Speed, VmName};

use super::pattern::{ClassSet, Glob, IdPattern};
use super::problem::Origin;
use crate::facts::{ConnectType, Fingerprint, HostUseKind, Removable};
use crate::topology::{Controller, KernelName, PortAddress};

/// The version of the language that this program speaks.
pub const SCHEMA_VERSION: i64 = 1;

/// Keys at the top of a file.
pub const TOP_KEYS: &[&str] =
    &["schema", "defaults", "protect", "revoke", "connectors", "devices", "vms", "deny", "assign"];
/// Keys of `[defaults]`.
pub const DEFAULTS_KEYS: &[&str] =
    &["mode", "on_conflict", "on_release", "reset", "claim_ports", "follow", "flap"];
/// Keys of `[protect]`.
pub const PROTECT_KEYS: &[&str] = &["keep_on_host", "in_use"];
/// Keys of `[revoke]`.
pub const REVOKE_KEYS: &[&str] = &["hard", "deadline"];
/// Keys of `[connectors.NAME]`.
pub const CONNECTOR_KEYS: &[&str] = &["at", "label", "subtree"];
/// Keys of `[devices.NAME]` beside those of a match.
pub const DEVICE_KEYS: &[&str] = &["also", "label"];
/// Keys of `[vms.NAME]`.
pub const VM_KEYS: &[&str] = &["label", "socket", "trust", "max_devices", "limits", "deny"];
/// Keys of `[[deny]]`.
pub const DENY_KEYS: &[&str] = &["name", "reason", "match"];
/// Keys of `[[assign]]`.
pub const ASSIGN_KEYS: &[&str] = &[
    "name",
    "vm",
    "vms",
    "match",
    "mode",
    "priority",
    "preempt",
    "on_conflict",
    "on_release",
    "reset",
    "claim_ports",
    "configuration",
    "follow",
    "expect",
    "allow_in_use",
    "limits",
];
/// Keys of a match.
pub const MATCH_KEYS: &[&str] = &[
    "device",
    "at",
    "controller",
    "depth",
    "id",
    "serial",
    "fingerprint",
    "product",
    "manufacturer",
    "class",
    "interfaces",
    "speed",
    "removable",
    "connect_type",
    "not",
];
/// Keys of `interfaces`.
pub const INTERFACES_KEYS: &[&str] = &["any", "all", "only", "none", "exactly"];
/// Keys of `limits`.
pub const LIMITS_KEYS: &[&str] = &["max_devices", "flap"];
/// Keys of `expect`.
pub const EXPECT_KEYS: &[&str] = &["id", "serial", "fingerprint"];

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$each:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$each])* $variant),+ }

        impl $name {
            /// The words a policy can use, with their meaning.
            pub const WORDS: &[(&'static str, Self)] = &[$(($word, Self::$variant)),+];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }
    };
}

words! {
    /// Whether a matching device is attached by itself.
    Mode {
        /// As soon as device and VM are there.
        Auto = "auto",
        /// Only when an operator says so.
        Manual = "manual",
        /// Like auto, and the VM is not ready without it.
        Required = "required",
    }
}

words! {
    /// What happens when rules of several VMs have an equal claim.
    OnConflict {
        /// Nobody gets the device.
        Refuse = "refuse",
        /// The VM that has it, else the one that came up first.
        FirstCome = "first-come",
        /// The VM that had it last, else nobody.
        LastUsed = "last-used",
    }
}

words! {
    /// What happens to a device that a VM gives up.
    OnRelease {
        /// The host's drivers get it back.
        Host = "host",
        /// It stays without a driver.
        Hold = "hold",
        /// It stays unauthorized (sysfs `authorized` = 0).
        Deauthorize = "deauthorize",
    }
}

words! {
    /// When a device is reset.
    Reset {
        /// Only when the guest asks.
        Never = "never",
        /// Before a VM gets it.
        OnAttach = "on-attach",
        /// After a VM gave it up.
        OnRelease = "on-release",
        /// Both times.
        Both = "both",
    }
}

words! {
    /// What happens when the host stops using a busy device.
    InUse {
        /// It is attached then.
        Wait = "wait",
        /// It stays with the host until it is plugged in again.
        Refuse = "refuse",
    }
}

/// So many plug-ins in so much time: `5/30s`. One more, and the device is left alone until it calms down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Flap {
    /// Plug-ins, 1 and up.
    pub count: u32,
    /// Time they are counted over.
    pub window: Duration,
}

impl fmt::Display for Flap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.count, Span(self.window))
    }
}

/// A duration as a policy writes it: `500ms`, `10s`, `5min`, `2h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        match millis {
            0 => f.write_str("0s"),
            _ if !millis.is_multiple_of(1000) => write!(f, "{millis}ms"),
            _ if millis.is_multiple_of(3_600_000) => write!(f, "{}h", millis / 3_600_000),
            _ if millis.is_multiple_of(60_000) => write!(f, "{}min", millis / 60_000),
            _ => write!(f, "{}s", millis / 1000),
        }
    }
}

/// `[defaults]`: what a rule has that does not say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// Default `auto`.
    pub mode: Mode,
    /// Default `refuse`.
    pub on_conflict: OnConflict,
    /// Default `host`.
    pub on_release: OnRelease,
    /// Default `never`.
    pub reset: Reset,
    /// Whether connectors that a rule names are kept from the host's drivers. Default yes.
    pub claim_ports: bool,
    /// How long a VM keeps its claim on a connector while a device re-enumerates. Default not at all.
    pub follow: Option<Duration>,
    /// Default none.
    pub flap: Option<Flap>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            on_conflict: OnConflict::Refuse,
            on_release: OnRelease::Host,
            reset: Reset::Never,
            claim_ports: true,
            follow: None,
            flap: None,
        }
    }
}

/// `[protect]`: what stays with the host, on top of the built-in guards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protect {
    /// Devices that never leave the host.
    pub keep_on_host: Vec<Match>,
    /// Default `wait`.
    pub in_use: InUse,
}

impl Default for Protect {
    fn default() -> Self {
        Self { keep_on_host: Vec::new(), in_use: InUse::Wait }
    }
}

/// `[revoke]`: how a device is taken from an instance that does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoke {
    /// Whether its port may be switched off for it. Default no.
    pub hard: bool,
    /// How long an instance has to answer a detach. Default 2 s.
    pub deadline: Duration,
}

impl Default for Revoke {
    fn default() -> Self {
        Self { hard: false, deadline: Duration::from_secs(2) }
    }
}

/// A place as a policy writes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PlaceRef {
    /// `front-left`, from `[connectors]`.
    Named(String),
    /// `pci-0000:00:14.0/usb2:9`.
    Port(PortAddress),
    /// `3-9.1`; the bus number holds until the next boot only.
    Kernel(KernelName),
    /// `003:9.1`, the same for people who come from EVE.
    Eve(KernelName),
}

impl fmt::Display for PlaceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Port(port) => port.fmt(f),
            Self::Kernel(name) => name.fmt(f),
            Self::Eve(name) => write!(f, "{:03}:{}", name.bus, name.chain),
        }
    }
}

/// `[connectors.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectorDef {
    /// Where it stands.
    pub origin: Origin,
    /// Its port or ports; any one of them is it.
    pub at: Vec<PlaceRef>,
    /// For people.
    pub label: Option<String>,
    /// Whether everything below a hub that is plugged in there is meant too.
    pub subtree: bool,
}

/// `[devices.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceDef {
    /// Where it stands.
    pub origin: Origin,
    /// How it is known.
    pub matches: Match,
    /// Other ids that the same thing shows in other states.
    pub also: Vec<IdPattern>,
    /// For people.
    pub label: Option<String>,
}

/// `limits`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Limits {
    /// How many devices at once.
    pub max_devices: Option<u32>,
    /// How many plug-ins in how much time.
    pub flap: Option<Flap>,
}

/// `[vms.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDef {
    /// Where it stands.
    pub origin: Origin,
    /// For people.
    pub label: Option<String>,
    /// Where its usbvfiod listens; none for `/run/usbvfiod/<name>/policy.sock`.
    pub socket: Option<String>,
    /// 0 to 100. From 50 on, `check` warns of rules that a lying device could use.
    pub trust: u8,
    /// Its limits.
    pub limits: Limits,
    /// What never goes to it.
    pub deny: Vec<Match>,
}

/// `[[deny]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenyRule {
    /// Where it stands.
    pub origin: Origin,
    /// Its name.
    pub name: Option<String>,
    /// For people.
    pub reason: Option<String>,
    /// What it is about.
    pub matches: Match,
}

/// `expect`: what a device must be, besides what a rule matches it by. Otherwise it is reported, not attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Expect {
    /// One of these ids.
    pub id: Vec<IdPattern>,
    /// One of these serial numbers.
    pub serial: Vec<Glob>,
    /// One of these fingerprints.
    pub fingerprint: Vec<Fingerprint>,
}

/// `[[assign]]`. What is `None` comes from [`Defaults`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignRule {
    /// Where it stands.
    pub origin: Origin,
    /// Its name.
    pub name: Option<String>,
    /// The VMs that may have the device, at least one, sorted.
    pub vms: Vec<VmName>,
    /// Where they are named.
    pub vms_at: Spot,
    /// What it is about.
    pub matches: Match,
    /// See [`Mode`].
    pub mode: Option<Mode>,
    /// Before all specificity. Default 0.
    pub priority: i32,
    /// Whether it may take the device from another VM. Default no.
    pub preempt: bool,
    /// See [`OnConflict`].
    pub on_conflict: Option<OnConflict>,
    /// See [`OnRelease`].
    pub on_release: Option<OnRelease>,
    /// See [`Reset`].
    pub reset: Option<Reset>,
    /// Whether its connectors are kept from the host's drivers.
    pub claim_ports: Option<bool>,
    /// Which configuration to set on an unconfigured device; none for the kernel's choice.
    pub configuration: Option<u8>,
    /// How long the VM keeps its claim while the device re-enumerates.
    pub follow: Option<Duration>,
    /// See [`Expect`].
    pub expect: Expect,
    /// Which uses by the host do not keep the device there.
    pub allow_in_use: Vec<HostUseKind>,
    /// Its limits.
    pub limits: Limits,
}

/// Where a match stands. It is no part of what the match says, so two spots are always equal.
#[derive(Clone, Debug, Default)]
pub struct Spot(pub Option<Origin>);

impl PartialEq for Spot {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for Spot {}

impl PartialOrd for Spot {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Spot {
    fn cmp(&self, _other: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

/// `interfaces`: tests over all interfaces of all configurations and alternates.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interfaces {
    /// At least one interface is of one of these.
    pub any: Vec<ClassSet>,
    /// Of each of these there is an interface.
    pub all: Vec<ClassSet>,
    /// Each interface is of one of these, and there is one.
    pub only: Vec<ClassSet>,
    /// No interface is of any of these.
    pub none: Vec<ClassSet>,
    /// `all` and `only` together.
    pub exactly: Vec<ClassSet>,
}

/// A match: all keys that are there must hold; of a list, one entry. An empty list stands for an absent key.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Match {
    /// Where it stands.
    pub spot: Spot,
    /// Names from `[devices]`.
    pub device: Vec<String>,
    /// Places.
    pub at: Vec<PlaceRef>,
    /// Controllers.
    pub controller: Vec<Controller>,
    /// How many hubs deep, each 0..=6.
    pub depth: Vec<u8>,
    /// Vendor and product ids.
    pub id: Vec<IdPattern>,
    /// Serial numbers, case matters.
    pub serial: Vec<Glob>,
    /// Fingerprints.
    pub fingerprint: Vec<Fingerprint>,
    /// Product strings, case does not matter.
    pub product: Vec<Glob>,
    /// Manufacturer strings, case does not matter.
    pub manufacturer: Vec<Glob>,
    /// Class of the device descriptor.
    pub class: Vec<ClassSet>,
    /// Classes of interfaces.
    pub interfaces: Interfaces,
    /// Speeds.
    pub speed: Vec<Speed>,
    /// Whether it can be pulled.
    pub removable: Vec<Removable>,
    /// How its port is wired.
    pub connect_type: Vec<ConnectType>,
    /// None of these may match. They have no `not` themselves.
    pub not: Vec<Match>,
}

/// A whole policy, all files merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// `[defaults]`.
    pub defaults: Defaults,
    /// `[protect]`.
    pub protect: Protect,
    /// `[revoke]`.
    pub revoke: Revoke,
    /// `[connectors]`.
    pub connectors: BTreeMap<String, ConnectorDef>,
    /// `[devices]`.
    pub devices: BTreeMap<String, DeviceDef>,
    /// `[vms]`.
    pub vms: BTreeMap<VmName, VmDef>,
    /// `[[deny]]`; their order means nothing.
    pub deny: Vec<DenyRule>,
    /// `[[assign]]`; their order means nothing.
    pub assign: Vec<AssignRule>,
}
