//! The command line of usbvfiod, which follows the conventions of QEMU's and Cloud Hypervisor's backend programs
//! (`docs/interop/vhost-user.rst`, "Backend program conventions"): one of `--socket-path` and `--fd`, SIGTERM ends it.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Parser};
use common::ids::VendorProduct;

/// Gives a virtual machine an xHCI controller and the USB devices that usbpolicyd hands over.
///
/// Start one for each VM, then start the VM:
///
///   cloud-hypervisor … --memory size=2G,shared=on --user-device socket=PATH
///
///   qemu-system-x86_64 … -object memory-backend-memfd,id=m,size=2G,share=on -machine memory-backend=m
///     -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"PATH"}}'
#[derive(Clone, Debug, Parser)]
#[command(version, verbatim_doc_comment)]
#[command(group(ArgGroup::new("vmm").required(true).args(["socket_path", "fd"])))]
#[command(group(ArgGroup::new("policy").args(["policy_socket", "policy_fd"])))]
pub struct Cli {
    /// Socket for the VMM (vfio-user); made here, a stale one is replaced
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Inherited socket for the VMM, listening or connected, instead of --socket-path
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,

    /// Socket for usbpolicyd; made here with mode 0660, a stale one is replaced
    #[arg(long, value_name = "PATH")]
    pub policy_socket: Option<PathBuf>,

    /// Inherited socket for usbpolicyd, listening or connected, instead of --policy-socket
    #[arg(long, value_name = "N")]
    pub policy_fd: Option<RawFd>,

    /// Group that owns --policy-socket, so that usbpolicyd may connect
    #[arg(long, value_name = "NAME", requires = "policy_socket")]
    pub policy_group: Option<String>,

    /// Root ports for USB 2 devices and as many for USB 3 devices
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u8).range(1..=15))]
    pub ports: u8,

    /// PCI vendor and device id of the controller; the class is always xHCI
    #[arg(long, value_name = "VVVV:DDDD", default_value = "1b36:000d")]
    pub pci_id: VendorProduct,

    /// Most memory for transfers in flight, in MiB, all devices together
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub transfer_memory: u32,

    /// DEBUGGING ONLY: keep all rights. A guest that takes over this process then owns whatever its user may do
    #[arg(long)]
    pub no_sandbox: bool,

    /// What to log, as in RUST_LOG: error, warn, info, debug, trace, or module=level,…
    #[arg(long, value_name = "FILTER", default_value = "info", env = "USBVFIOD_LOG")]
    pub log: String,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("usbvfiod").chain(words.split_whitespace()))
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn one_way_to_the_vmm_is_needed_and_only_one_taken() {
        assert!(parse("").is_err());
        assert!(parse("--socket-path=/a --fd=3").is_err());
        assert_eq!(parse("--fd=3").unwrap().fd, Some(3));
        assert_eq!(parse("--socket-path=/a").unwrap().socket_path, Some(PathBuf::from("/a")));
    }

    #[test]
    fn two_ways_to_usbpolicyd_are_refused() {
        assert!(parse("--fd=3 --policy-fd=4 --policy-socket=/b").is_err());
    }

    #[test]
    fn ports_beyond_what_linux_guests_take_are_refused() {
        assert!(parse("--fd=3 --ports=0").is_err());
        assert!(parse("--fd=3 --ports=16").is_err());
        assert_eq!(parse("--fd=3").unwrap().ports, 15);
    }

    #[test]
    fn a_bad_pci_id_is_told_with_its_form() {
        let message = parse("--fd=3 --pci-id=1b36").unwrap_err().to_string();
        assert!(message.contains("vendor:product, four hex digits each"), "{message}");
    }
}
