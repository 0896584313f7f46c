//! Requests of `usbpolicyctl` and the daemon's answers. The JSON of `list --json` and the other verbs is made of these.

use common::ids::{BusAddress, DeviceId, Speed, VendorProduct, VmName};
use serde::{Deserialize, Serialize};

use crate::audit;
use crate::facts::{ClassTriple, HostUse};
use crate::policy::decide::{Context, Verdict};

/// Version of all JSON that `usbpolicyctl` prints. New members may come; none changes its meaning within a version.
pub const JSON_VERSION: u32 = 1;
/// Longest packet in bytes, either way.
pub const PACKET_MAX: usize = 64 * 1024;
/// Most different interface classes that are shown of one device.
pub const CLASSES_MAX: usize = 64;
/// Most connected VMs that are told with one device.
pub const UP_MAX: usize = 256;

/// How long an operator's order lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lasting {
    /// Until the device leaves the VM, or is unplugged.
    Once,
    /// Until it is unplugged.
    #[default]
    UntilUnplug,
    /// Until it is cleared; survives restarts and reboots.
    Persist,
}

/// What `usbpolicyctl` asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Request {
    /// All devices.
    List,
    /// All VMs.
    Vms,
    /// Give a device to a VM.
    Attach {
        /// Kernel name, `bus:dev`, id, connector or `vendor:product`, if only one device fits.
        device: String,
        /// To whom.
        vm: VmName,
        /// For how long.
        lasting: Lasting,
        /// Also when another VM has it.
        steal: bool,
    },
    /// Take a device from its VM and keep it from all.
    Detach {
        /// As in `Attach`.
        device: String,
        /// For how long.
        lasting: Lasting,
    },
    /// Take an operator's order back, so that the policy decides again.
    Clear {
        /// As in `Attach`; none for all orders.
        device: Option<String>,
    },
    /// All orders in force.
    Orders,
    /// Take a device from its VM and keep it from all, by force if its instance does not let go: its port is switched
    /// off and on.
    Revoke {
        /// As in `Attach`.
        device: String,
        /// For how long.
        #[serde(default)]
        lasting: Lasting,
    },
    /// Try a failed hand-over again now.
    Retry {
        /// As in `Attach`.
        device: String,
    },
    /// Change what a VM gets: `running`, `paused` or `drained`.
    Serve {
        /// Which VM.
        vm: VmName,
        /// How.
        service: Service,
    },
    /// Load the policy again.
    Reload,
    /// The audit entries that are kept.
    Log {
        /// Only those of this device, as in `Attach`, or of this kernel name or connector when it is unplugged.
        device: Option<String>,
    },
    /// Audit entries as they come.
    Watch,
    /// The daemon's own state.
    Status,
}

/// Whether a VM gets devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// By the rules.
    Running,
    /// It keeps what it has and gets nothing new.
    Paused,
    /// It loses what it has and gets nothing.
    Drained,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum State {
    /// With the host.
    Host,
    /// With the host, though the policy gives it to a VM.
    Idle {
        /// Value of `usbpolicyd.mode=` on the kernel's command line: `observe` or `off`.
        mode: String,
    },
    /// Without drivers, kept for its VM.
    OnHold,
    /// Deauthorized by us.
    Deauthorized,
    /// Being handed over.
    Attaching {
        /// To whom.
        vm: VmName,
    },
    /// With a VM.
    Attached {
        /// With whom.
        vm: VmName,
        /// Port of the guest's root hub, 0 while unknown.
        guest_port: u8,
    },
    /// Leaving a VM.
    Detaching {
        /// Whom.
        vm: VmName,
    },
    /// The instance does not let go.
    Stuck {
        /// Whose.
        vm: VmName,
    },
    /// Being given back.
    Releasing,
    /// Its VM's instance does not run.
    VmDown {
        /// Whose.
        vm: VmName,
    },
    /// Its VM is paused or drained.
    VmPaused {
        /// Which.
        vm: VmName,
    },
    /// Its VM has as many devices as it may have.
    VmFull {
        /// Which.
        vm: VmName,
    },
    /// A hand-over failed.
    Failed {
        /// To whom.
        vm: VmName,
        /// Why.
        text: String,
        /// When it is tried again.
        retry_in_ms: u64,
    },
    /// No VM has it, and what its release asks for failed.
    NotReleased {
        /// Why.
        text: String,
        /// When it is tried again.
        retry_in_ms: u64,
    },
    /// Plugged too often; left alone for a while.
    Flapping {
        /// For how long.
        calm_in_ms: u64,
    },
    /// The daemon has just started.
    Starting,
    /// No daemon was asked: what the policy says is all that is known.
    Unknown,
}

/// One device of `list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceView {
    /// Our name of the plug-in; none without a daemon.
    pub id: Option<DeviceId>,
    /// The kernel's name.
    pub name: String,
    /// Bus and device number.
    pub address: BusAddress,
    /// The socket in its stable form.
    pub connector: String,
    /// What the policy calls the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connector_name: Option<String>,
    /// All halves of the socket.
    pub halves: Vec<String>,
    /// Vendor and product id.
    pub ids: VendorProduct,
    /// As the device says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<String>,
    /// As the device says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product: Option<String>,
    /// As the device says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// `fp1:…`.
    pub fingerprint: String,
    /// Speed.
    pub speed: Speed,
    /// Whether it is a hub.
    pub hub: bool,
    /// Classes of its interfaces, each once.
    pub classes: Vec<ClassTriple>,
    /// Host drivers that are bound, each once.
    pub drivers: Vec<String>,
    /// What the host does with it.
    pub host_use: Vec<HostUse>,
    /// What the policy says.
    pub decision: Verdict,
    /// Where it is.
    pub state: State,
    /// What else the decision depended on; of the VMs that are up, [`UP_MAX`] at most.
    #[serde(default)]
    pub context: Context,
    /// An operator's order for it, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
}

/// One VM of `vm list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmView {
    /// Its name.
    pub name: VmName,
    /// What the policy calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whether the policy has it.
    pub in_policy: bool,
    /// Whether its instance answers; none when that is not known.
    pub up: Option<bool>,
    /// Whether its VMM was connected when the instance was last asked.
    pub vmm_connected: Option<bool>,
    /// What it gets.
    pub service: Service,
    /// How many devices it has.
    pub devices: usize,
    /// Rules with `mode = "required"` by which it should have a device and has none.
    #[serde(default)]
    pub missing: Vec<String>,
    /// How many it may have.
    pub max_devices: Option<u32>,
    /// Where its socket is.
    pub socket: String,
    /// Why its instance cannot be reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// One order of an operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderView {
    /// For which device, in words.
    pub device: String,
    /// To whom; none to keep it from all.
    pub vm: Option<VmName>,
    /// For how long.
    pub lasting: Lasting,
    /// Who ordered it.
    pub actor: String,
    /// Seconds since 1970.
    pub time: u64,
}

/// The daemon's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusView {
    /// Version of the program.
    pub program: String,
    /// `normal`, `observe` or `off`.
    pub mode: String,
    /// Whether a policy is loaded.
    pub policy: bool,
    /// The files of the policy.
    pub files: Vec<String>,
    /// Number of the last audit entry.
    pub last_seq: u64,
    /// In words, as systemd shows it.
    pub status: String,
    /// Ports that are kept from the host's drivers.
    pub claimed_ports: Vec<String>,
}

/// One packet of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Reply {
    /// Of `List`.
    Device(Box<DeviceView>),
    /// Of `Vms`.
    Vm(VmView),
    /// Of `Orders`.
    Order(OrderView),
    /// Of `Log` and `Watch`.
    Entry(audit::Entry),
    /// Of `Status`.
    Status(StatusView),
    /// A line for the operator.
    Note {
        /// The line.
        text: String,
    },
    /// That was all.
    End {
        /// Whether it worked.
        ok: bool,
        /// What was done, or why not.
        text: String,
    },
}

impl Request {
    /// What somebody needs to be to ask for this.
    pub const fn role(&self) -> super::Role {
        use super::Role;
        match self {
            Self::List | Self::Vms | Self::Orders | Self::Log { .. } | Self::Watch | Self::Status => {
                Role::View
            }
            Self::Attach { lasting: Lasting::Persist, .. }
            | Self::Detach { lasting: Lasting::Persist, .. } => Role::Admin,
            Self::Attach { .. }
            | Self::Detach { .. }
            | Self::Clear { device: Some(_) }
            | Self::Retry { .. }
            | Self::Serve { .. } => Role::Operate,
            Self::Clear { device: None } | Self::Revoke { .. } | Self::Reload => Role::Admin,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Role;
    use super::*;

    #[test]
    fn looking_needs_view_and_lasting_orders_need_admin() {
        let detach = |lasting| Request::Detach { device: "1-1".into(), lasting };
        assert_eq!(Request::List.role(), Role::View);
        assert_eq!(detach(Lasting::Once).role(), Role::Operate);
        assert_eq!(detach(Lasting::Persist).role(), Role::Admin);
        assert_eq!(Request::Reload.role(), Role::Admin);
    }

    #[test]
    fn requests_look_like_this_on_the_wire() {
        let request = Request::Attach {
            device: "3-9.1".into(),
            vm: "work".parse().unwrap(),
            lasting: Lasting::UntilUnplug,
            steal: false,
        };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(
            text,
            r#"{"verb":"attach","device":"3-9.1","vm":"work","lasting":"until-unplug","steal":false}"#
        );
    }
}
