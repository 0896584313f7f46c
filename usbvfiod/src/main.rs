//! The daemon: start-up in the order that gives rights up as early as each step allows.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use common::channel::{self, Channel};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Group, Uid, chown, getgid, getuid};
use sd_notify::NotifyState;
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use usbvfiod::cli::Cli;
use usbvfiod::daemon::{Daemon, Parts};
use usbvfiod::pci;
use usbvfiod::pci::config::{ConfigSpace, Ids};
use usbvfiod::pci::msix::Msix;
use usbvfiod::policy_link::{Allowed, PolicyLink};
use usbvfiod::sandbox;
use usbvfiod::usb::{DeviceSet, Lanes, Limits};
use usbvfiod::vfio_user::transport::{self, Inherited, Listener};
use usbvfiod::xhci::{Controller, ControllerConfig};

/// Interrupters of the controller, each with a vector. Linux uses one; Windows one for each processor up to eight.
const INTERRUPTERS: u16 = 8;
/// Device slots, as many as the ports can need and some for a guest that is slow to give them back.
const SLOTS: u8 = 64;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("usbvfiod: --log {:?}: {error}; try \"info\" or \"usbvfiod=debug\"", cli.log);
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let signals = block_signals().context("cannot block signals")?;
    let (vmm_listener, vmm_connection) = vmm_socket(cli)?;
    let link = policy_socket(cli)?;
    if cli.no_sandbox {
        warn!(
            "--no-sandbox: NOT CONFINED. A guest that takes over this process owns all that its user may do"
        );
    } else {
        sandbox::close_file_system().context("cannot confine this process, so it does not start")?;
    }
    let ports = usize::from(cli.ports) * 2;
    let lanes = Lanes::start(ports).context("cannot start the lane threads")?;
    let limits = Limits { mapped_total: cli.transfer_memory as usize * 1024 * 1024, ..Limits::default() };
    let layout = pci::layout(INTERRUPTERS);
    let ids = Ids { vendor: cli.pci_id.vendor, device: cli.pci_id.product, ..Ids::default() };
    let config = ControllerConfig {
        usb2_ports: cli.ports,
        usb3_ports: cli.ports,
        slots: SLOTS,
        interrupters: INTERRUPTERS,
        ..ControllerConfig::default()
    };
    let daemon = Daemon::new(Parts {
        signals,
        vmm_listener,
        vmm_connection,
        link,
        config: ConfigSpace::new(ids, INTERRUPTERS),
        msix: Msix::new(INTERRUPTERS),
        controller: Controller::new(config),
        usb: DeviceSet::new(lanes, limits),
        layout,
        ports: (cli.ports, cli.ports),
    })
    .context("cannot start the event loop")?;
    info!(ports = cli.ports, "ready for a VMM and for usbpolicyd");
    // While sockets can still be made. Without systemd there is nobody to tell.
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        warn!(%error, "systemd could not be told that we are ready");
    }
    if !cli.no_sandbox {
        sandbox::close_system_calls().context("cannot confine this process, so it does not start")?;
    }
    daemon.run().context("the event loop broke")
}

/// SIGTERM and SIGINT come through a file, in all threads.
fn block_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn vmm_socket(cli: &Cli) -> Result<(Option<Listener>, Option<transport::Connection>)> {
    if let Some(path) = &cli.socket_path {
        return Ok((Some(Listener::bind(path)?), None));
    }
    let Some(fd) = cli.fd else { bail!("one of --socket-path and --fd is needed") };
    Ok(match transport::inherit(fd).context("--fd")? {
        Inherited::Listener(listener) => (Some(listener), None),
        Inherited::Connection(connection) => (None, Some(connection)),
    })
}

fn policy_socket(cli: &Cli) -> Result<PolicyLink> {
    let mut allowed = Allowed { uid: getuid().as_raw(), gid: getgid().as_raw() };
    if let Some(path) = &cli.policy_socket {
        let listener = channel::Listener::bind(path, 0o660).with_context(|| match path.exists() {
            true => format!(
                "--policy-socket {}: another process listens there, or it is no socket",
                path.display()
            ),
            false => {
                format!("--policy-socket {}: its directory has to be there and writable", path.display())
            }
        })?;
        if let Some(name) = &cli.policy_group {
            allowed.gid = give_to_group(path, name)?;
        }
        return Ok(PolicyLink::listening(listener, allowed));
    }
    let Some(number) = cli.policy_fd else {
        warn!("neither --policy-socket nor --policy-fd: no device will ever come");
        return Ok(PolicyLink::none());
    };
    let fd =
        || -> Result<OwnedFd> { transport::inherit_fd(number).context("--policy-fd: no such descriptor") };
    Ok(match channel::Listener::try_from(fd()?) {
        Ok(listener) => PolicyLink::listening(listener, allowed),
        Err(_) => {
            let channel = Channel::try_from(fd()?).context("--policy-fd wants a UNIX SEQPACKET socket")?;
            PolicyLink::connected(channel, allowed)
        }
    })
}

/// Lets the members of a group connect. The socket was made with mode 0660 and our own group, so nobody else had a way
/// in before.
fn give_to_group(path: &Path, name: &str) -> Result<u32> {
    let group = Group::from_name(name).context("cannot read the group database")?.with_context(|| {
        format!("--policy-group: there is no group {name:?}; make it with systemd-sysusers or groupadd -r")
    })?;
    chown(path, None::<Uid>, Some(group.gid)).with_context(|| {
        format!("cannot give {} to group {name}: this process has to be a member of it", path.display())
    })?;
    Ok(group.gid.as_raw())
}
