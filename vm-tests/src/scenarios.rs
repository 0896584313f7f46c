//! What scenarios share: the VMM they run on, and each of them once for each VMM.

use crate::guest::{GuestConfig, Vmm, vfio_socket};

/// The VMMs that must always work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// QEMU of the image.
    Qemu,
    /// The binary that `CLOUD_HYPERVISOR` names.
    CloudHypervisor,
}

impl Client {
    /// A guest whose controller is the usbvfiod of the same name.
    pub fn guest(self, vm: &str) -> GuestConfig {
        let socket = vfio_socket(vm);
        GuestConfig::new(
            vm,
            match self {
                Self::Qemu => Vmm::Qemu { socket },
                Self::CloudHypervisor => Vmm::CloudHypervisor { socket },
            },
        )
    }

    /// Whether it is there; says so when it is not.
    pub fn is_available(self) -> bool {
        let available = self == Self::Qemu || std::env::var_os("CLOUD_HYPERVISOR").is_some();
        if !available {
            eprintln!("skipped: CLOUD_HYPERVISOR names no binary");
        }
        available
    }
}

/// Makes a test of each named function `fn(Client) -> Result<()>` for each VMM.
#[macro_export]
macro_rules! on_each_client {
    ($($name:ident),+ $(,)?) => {
        $crate::on_each_client!(@ qemu, Qemu, $($name),+);
        $crate::on_each_client!(@ cloud_hypervisor, CloudHypervisor, $($name),+);
    };
    (@ $module:ident, $client:ident, $($name:ident),+) => {
        mod $module {
            $(
                #[test]
                fn $name() -> anyhow::Result<()> {
                    let client = $crate::scenarios::Client::$client;
                    if client.is_available() { super::$name(client) } else { Ok(()) }
                }
            )+
        }
    };
}
