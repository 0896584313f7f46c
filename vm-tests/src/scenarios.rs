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
}

/// Makes a test of each named function `fn(Client) -> Result<()>` for each VMM. Those for Cloud Hypervisor are ignored
/// when the tests were built without `CLOUD_HYPERVISOR` (`build.rs`).
#[macro_export]
macro_rules! on_each_client {
    ($($name:ident),+ $(,)?) => {
        mod qemu {
            $(
                #[test]
                fn $name() -> anyhow::Result<()> {
                    super::$name($crate::scenarios::Client::Qemu)
                }
            )+
        }
        mod cloud_hypervisor {
            $(
                #[test]
                #[cfg_attr(not(cloud_hypervisor), ignore = "CLOUD_HYPERVISOR names no binary")]
                fn $name() -> anyhow::Result<()> {
                    super::$name($crate::scenarios::Client::CloudHypervisor)
                }
            )+
        }
    };
}
