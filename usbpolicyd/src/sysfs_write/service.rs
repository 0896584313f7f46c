//! `usbpolicyd-sysfs`: takes orders of `usbpolicyd`'s user at a socket, one at a time, and ends when nobody asks.
//!
//! It is root without a capability: it writes what root's owner rights reach. What it keeps of these is
//! `/sys/devices`, and of the system calls those that are listed here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use common::channel::{Channel, Listener};
use common::confine::{self, Allow, ConfineError, Keep};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Uid, User};

use super::tree::Tree;
use super::{Answer, Order, SOCKET};

/// Without an order for so long it ends; its socket starts it again.
const IDLE: Duration = Duration::from_secs(10);
/// How long a client may take to say what it wants.
const CLIENT_WITHIN: Duration = Duration::from_secs(1);

/// Writes to sysfs what usbpolicyd may not: `authorized` of a USB device, and its port off and on.
///
/// Started by usbpolicyd-sysfs.socket, which passes the listening socket as standard input. Takes orders of root and of
/// the user of usbpolicyd only, and ends after ten seconds without one.
#[derive(Clone, Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    /// Make the socket here and stay, without systemd; usually at /run/usbpolicyd-sysfs.sock
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// The user whose orders are taken
    #[arg(long, value_name = "NAME", default_value = "usbpolicyd")]
    pub user: String,
}

const FCNTL_COMMANDS: [u32; 3] = [libc::F_GETFL as u32, libc::F_SETFL as u32, libc::F_GETFD as u32];

/// The system calls that stay, beside those of every daemon.
const CALLS: &[(libc::c_long, Allow)] = &[
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_poll, Allow::Any),
    (libc::SYS_ppoll, Allow::Any),
    (libc::SYS_accept4, Allow::Any),
    (libc::SYS_recvmsg, Allow::Any),
    (libc::SYS_sendmsg, Allow::Any),
    (libc::SYS_getsockopt, Allow::Any),
    (libc::SYS_fcntl, Allow::OneOf(1, &FCNTL_COMMANDS)),
    // sysfs; Landlock says what of it.
    (libc::SYS_openat, Allow::Any),
    (libc::SYS_readlinkat, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_readlink, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_newfstatat, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_lstat, Allow::Any),
    (libc::SYS_statx, Allow::Any),
    (libc::SYS_fstat, Allow::Any),
    (libc::SYS_lseek, Allow::Any),
    (libc::SYS_getcwd, Allow::Any),
    (libc::SYS_nanosleep, Allow::Any),
];

/// Gives up everything but reading the list of USB devices and writing below `devices` of the sysfs at `sysfs`.
pub fn confine(sysfs: &str) -> Result<(), ConfineError> {
    confine::drop_privileges()?;
    let keep = [Keep::Write(format!("{sysfs}/devices").into()), Keep::Read(format!("{sysfs}/bus").into())];
    confine::landlock(&keep)?;
    confine::seccomp(CALLS)
}

/// Runs until nobody asks any more, or, with `--socket`, for ever.
pub fn run(cli: &Cli) -> Result<()> {
    let user = User::from_name(&cli.user)?.with_context(|| format!("there is no user {}", cli.user))?;
    let listener = match &cli.socket {
        Some(path) => {
            let listener = Listener::bind(path, 0o600).with_context(|| {
                format!("cannot listen at {}; does another usbpolicyd-sysfs run?", path.display())
            })?;
            chown(path, Some(user.uid.as_raw()), None).context("cannot give the socket to its user")?;
            listener
        }
        None => inherited()?,
    };
    confine("/sys").context("cannot confine itself")?;
    let idle = cli.socket.is_none().then_some(IDLE);
    while serve_one(&listener, user.uid, &Tree::default(), idle)? {}
    Ok(())
}

/// The listening socket that came as standard input.
fn inherited() -> Result<Listener> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    let Ok(listener) = Listener::try_from(stdin) else {
        bail!(
            "standard input is no listening socket; start usbpolicyd-sysfs.socket, or use --socket {SOCKET}"
        );
    };
    Ok(listener)
}

/// Serves the next client; `false` when none comes for `idle`.
fn serve_one(listener: &Listener, user: Uid, tree: &Tree, idle: Option<Duration>) -> Result<bool> {
    if !readable(listener.as_fd(), idle)? {
        return Ok(false);
    }
    if let Some(channel) = listener.accept()? {
        attend(channel, user, tree);
    }
    Ok(true)
}

/// Takes one order, carries it out, answers. Whoever breaks the rules is closed without a word.
fn attend(mut channel: Channel, user: Uid, tree: &Tree) {
    match channel.peer().map(|peer| Uid::from_raw(peer.uid())) {
        Ok(uid) if uid == user || uid.is_root() => {}
        Ok(uid) => return tracing::warn!(%uid, "turned away: orders are taken of root and usbpolicyd only"),
        Err(error) => return tracing::warn!(%error, "turned away: unknown user"),
    }
    if !matches!(readable(channel.as_fd(), Some(CLIENT_WITHIN)), Ok(true)) {
        return tracing::warn!("turned away: says nothing");
    }
    let order: Order = match channel.receive() {
        Ok(Some((order, None))) => order,
        Ok(_) => return tracing::warn!("turned away: an order has no file"),
        Err(error) => return tracing::warn!("turned away: {:#}", anyhow::Error::from(error)),
    };
    let result = tree.carry_out(&order).map_err(|error| format!("{:#}", anyhow::Error::from(error)));
    let text = result.err().unwrap_or_default();
    let Order { device, verb, .. } = &order;
    if text.is_empty() {
        tracing::info!(%device, ?verb, "done");
    } else {
        tracing::warn!(%device, ?verb, text, "not done");
    }
    // Whoever does not wait for the answer does not want it.
    let _ = channel.send(&Answer { ok: text.is_empty(), text }, None);
}

/// Waits until a descriptor can be read; `false` after `limit`.
fn readable(fd: BorrowedFd<'_>, limit: Option<Duration>) -> Result<bool> {
    let timeout = match limit {
        Some(limit) => PollTimeout::try_from(limit.as_millis()).unwrap_or(PollTimeout::MAX),
        None => PollTimeout::NONE,
    };
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory as _;
    use common::ids::BusAddress;
    use nix::unistd::geteuid;

    use super::super::{AskError, Verb, ask};
    use super::*;
    use crate::sysfs::tests::{Tree as MadeUp, put};

    fn order() -> Order {
        let address = BusAddress { bus: 1, device: 3 };
        Order { device: "1-4".parse().unwrap(), address, verb: Verb::Deauthorize }
    }

    const LONG: Option<Duration> = Some(Duration::from_secs(60));

    /// What `client` got from a service that serves so many at a made-up sysfs with a stick in port 4, and the stick's
    /// `authorized` afterwards.
    fn with_service<T>(clients: usize, client: impl FnOnce(&Path) -> T) -> (T, String) {
        let made_up = MadeUp::new();
        let device = made_up.plug("1-4", 3);
        put(&device, "bDeviceClass", "00\n");
        let socket = made_up.path("socket");
        let listener = Listener::bind(&socket, 0o600).unwrap();
        let tree = Tree::new(made_up.dir.path());
        let got = std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..clients {
                    assert!(serve_one(&listener, geteuid(), &tree, LONG).unwrap());
                }
            });
            client(&socket)
        });
        (got, std::fs::read_to_string(device.join("authorized")).unwrap())
    }

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn order_is_carried_out_and_answered() {
        let (result, authorized) = with_service(1, |socket| ask(socket, &order()));
        result.unwrap();
        assert_eq!(authorized, "0\n");
    }

    #[test]
    fn refusal_tells_why() {
        let mut other = order();
        other.address.device = 9;
        let (result, authorized) = with_service(1, |socket| ask(socket, &other));
        let text = result.unwrap_err().to_string();
        assert!(text.contains("1-4 is another device now: 001:003, not 001:009"), "{text}");
        assert_eq!(authorized, "1\n");
    }

    #[test]
    fn packet_that_is_no_order_is_closed_and_the_next_client_is_served() {
        let (results, authorized) = with_service(4, |socket| {
            let odd = [
                serde_json::json!({"device": "1-4", "address": {"bus": 1, "device": 3}, "verb": "remove"}),
                serde_json::json!({"device": "../1-4", "address": {"bus": 1, "device": 3}, "verb": "authorize"}),
                serde_json::json!({"device": "1-4", "address": {"bus": 1, "device": 3}, "verb": "authorize", "x": 1}),
            ];
            for packet in odd {
                let mut channel = Channel::dial(socket).unwrap();
                channel.send(&packet, None).unwrap();
                assert!(readable(channel.as_fd(), LONG).unwrap());
                assert!(channel.receive::<Answer>().is_err(), "{packet} was answered");
            }
            ask(socket, &order())
        });
        results.unwrap();
        assert_eq!(authorized, "0\n");
    }

    #[test]
    fn missing_service_is_named_with_the_way_to_switch_it_on() {
        let error = ask(Path::new("/nonexistent/socket"), &order()).unwrap_err();
        assert!(matches!(error, AskError::NotThere { .. }));
        assert!(error.to_string().contains("systemctl enable --now usbpolicyd-sysfs.socket"));
    }
}
