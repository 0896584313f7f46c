//! The connection to `usbpolicyd`: who may connect, what may be said in which order, what is answered to nonsense.
//!
//! It decides about messages, not about devices: [`PolicyLink::receive`] yields requests that are well-formed, and the
//! daemon carries them out. When the connection ends nothing happens to the devices.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use common::channel::{Channel, ChannelError, Listener};
use common::ids::DeviceId;
use common::limited;
use common::wire::{Attach, FromInstance, PROTOCOL_VERSION, Stats, ToInstance, cut_text};
use nix::sys::socket::UnixCredentials;

/// Messages taken from the connection before other work gets its turn.
const MESSAGES_PER_TURN: usize = 16;

/// What usbpolicyd wants from the daemon.
#[derive(Debug)]
pub enum Request {
    /// Answer with [`FromInstance::Hello`]; the version fits.
    Hello,
    /// Take this device.
    Attach(Attach, OwnedFd),
    /// Give it back.
    Detach(DeviceId),
    /// Tell a page of the devices.
    List {
        /// Last id of the page before.
        after: Option<DeviceId>,
    },
    /// Answer with [`FromInstance::Pong`].
    Ping {
        /// Comes back.
        nonce: u64,
    },
}

/// Users and group whose processes may connect besides root.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Our own user.
    pub uid: u32,
    /// Group of the policy socket.
    pub gid: u32,
}

impl Allowed {
    fn has(self, peer: &UnixCredentials) -> bool {
        peer.uid() == 0 || peer.uid() == self.uid || peer.gid() == self.gid
    }
}

#[derive(Debug)]
struct Peer {
    channel: Channel,
    greeted: bool,
    pid: i32,
}

/// Listener and the one connection.
#[derive(Debug)]
pub struct PolicyLink {
    listener: Option<Listener>,
    peer: Option<Peer>,
    allowed: Allowed,
}

impl PolicyLink {
    /// Waits for connections at `listener`.
    pub fn listening(listener: Listener, allowed: Allowed) -> Self {
        Self { listener: Some(listener), peer: None, allowed }
    }

    /// Uses a connection that was handed to us; there will be no other.
    pub fn connected(channel: Channel, allowed: Allowed) -> Self {
        Self { listener: None, peer: Some(Peer { channel, greeted: false, pid: 0 }), allowed }
    }

    /// No usbpolicyd at all.
    pub fn none() -> Self {
        Self { listener: None, peer: None, allowed: Allowed { uid: 0, gid: 0 } }
    }

    /// The listener, to wait for connections.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// The connection, to wait for messages.
    pub fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.peer.as_ref().map(|peer| peer.channel.as_fd())
    }

    /// Takes a waiting connection. Call it only when [`Self::receive`] has taken all messages, so that the end of an old
    /// connection was seen: a second usbpolicyd is told and closed. True when there is a new connection.
    pub fn accept(&mut self) -> bool {
        let Some(listener) = &self.listener else { return false };
        let channel = match listener.accept() {
            Ok(Some(channel)) => channel,
            Ok(None) => return false,
            Err(error) => {
                limited!(warn, %error, "cannot accept a connection of usbpolicyd");
                return false;
            }
        };
        let credentials = match channel.peer() {
            Ok(credentials) => credentials,
            Err(error) => {
                limited!(warn, %error, "cannot tell who connected to the policy socket; connection closed");
                return false;
            }
        };
        let (uid, pid) = (credentials.uid(), credentials.pid());
        let refusal = if !self.allowed.has(&credentials) {
            Some(format!(
                "uid {uid} may not connect: only root, uid {} and group {} may; run usbpolicyd as one of these or \
                 change usbvfiod's --policy-group",
                self.allowed.uid, self.allowed.gid
            ))
        } else {
            let busy = |peer: &Peer| {
                format!("another usbpolicyd (pid {}) is connected; one host runs one usbpolicyd", peer.pid)
            };
            self.peer.as_ref().map(busy)
        };
        if let Some(text) = refusal {
            limited!(warn, uid, pid, reason = text, "connection to the policy socket refused");
            // The peer is closed anyway; if it does not read the reason, it stands in our log.
            let _ = channel.send(&FromInstance::Error { text: cut_text(text) }, None);
            return false;
        }
        limited!(info, uid, pid, "usbpolicyd connected");
        self.peer = Some(Peer { channel, greeted: false, pid });
        true
    }

    /// Takes what has arrived, in order, at most `MESSAGES_PER_TURN` requests. A peer that breaks the protocol is told
    /// why and closed.
    pub fn receive(&mut self) -> Vec<Request> {
        let mut requests = Vec::new();
        while requests.len() < MESSAGES_PER_TURN {
            let Some(peer) = &mut self.peer else { break };
            match peer.channel.receive::<ToInstance>() {
                Ok(None) => break,
                Ok(Some((message, file))) => match check(message, file, peer.greeted) {
                    Ok(request) => {
                        peer.greeted = true;
                        requests.push(request);
                    }
                    Err(text) => self.refuse(text),
                },
                Err(ChannelError::Closed) => {
                    limited!(info, "usbpolicyd disconnected; devices stay");
                    self.peer = None;
                }
                Err(error) => self.refuse(with_source(&error)),
            }
        }
        requests
    }

    /// Sends if somebody is there. A peer that does not read is closed: it asks again when it is back.
    pub fn send(&mut self, message: &FromInstance) {
        let Some(peer) = &self.peer else { return };
        if let Err(error) = peer.channel.send(message, None) {
            limited!(warn, %error, "connection to usbpolicyd closed; devices stay");
            self.peer = None;
        }
    }

    /// Answers [`Request::Ping`].
    pub fn pong(&mut self, nonce: u64, stats: Stats) {
        self.send(&FromInstance::Pong { nonce, stats });
    }

    fn refuse(&mut self, text: String) {
        limited!(warn, reason = text, "connection of usbpolicyd closed; devices stay");
        self.send(&FromInstance::Error { text: cut_text(text) });
        self.peer = None;
    }
}

/// Which request a message is, or why it is none.
fn check(message: ToInstance, file: Option<OwnedFd>, greeted: bool) -> Result<Request, String> {
    match (message, file) {
        (ToInstance::Hello { version: PROTOCOL_VERSION }, None) => Ok(Request::Hello),
        (ToInstance::Hello { version }, None) => Err(format!(
            "usbpolicyd speaks version {version} of the channel, usbvfiod {PROTOCOL_VERSION}; install both from one release"
        )),
        _ if !greeted => Err("the first message must be \"hello\"".to_owned()),
        (ToInstance::Attach(attach), Some(file)) => Ok(Request::Attach(attach, file)),
        (ToInstance::Attach(attach), None) => {
            Err(format!("\"attach\" of device {} came without its file", attach.id))
        }
        (_, Some(_)) => Err("a file came with a message that takes none".to_owned()),
        (ToInstance::Detach { id, deadline_ms: _ }, None) => Ok(Request::Detach(id)),
        (ToInstance::List { after }, None) => Ok(Request::List { after }),
        (ToInstance::Ping { nonce }, None) => Ok(Request::Ping { nonce }),
    }
}

fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> Allowed {
        Allowed { uid: nix::unistd::getuid().as_raw(), gid: nix::unistd::getgid().as_raw() }
    }

    fn link() -> (PolicyLink, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        (PolicyLink::connected(ours, allowed()), theirs)
    }

    fn greeted_link() -> (PolicyLink, Channel) {
        let (mut link, peer) = link();
        peer.send(&ToInstance::Hello { version: PROTOCOL_VERSION }, None).unwrap();
        link.receive();
        (link, peer)
    }

    fn error_text(peer: &mut Channel) -> String {
        match peer.receive::<FromInstance>().unwrap().unwrap().0 {
            FromInstance::Error { text } => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn hello_comes_first() {
        let (mut link, mut peer) = link();
        peer.send(&ToInstance::Ping { nonce: 1 }, None).unwrap();
        assert!(link.receive().is_empty());
        assert!(error_text(&mut peer).contains("first message must be"));
        assert!(link.connection().is_none());
    }

    #[test]
    fn another_version_is_told_and_closed() {
        let (mut link, mut peer) = link();
        peer.send(&ToInstance::Hello { version: 99 }, None).unwrap();
        assert!(link.receive().is_empty());
        assert!(error_text(&mut peer).contains("version 99"));
        assert!(matches!(peer.receive::<FromInstance>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn a_file_with_a_message_that_takes_none_closes() {
        let (mut link, mut peer) = greeted_link();
        let file = tempfile::tempfile().unwrap();
        peer.send(&ToInstance::Ping { nonce: 1 }, Some(file.as_fd())).unwrap();
        assert!(link.receive().is_empty());
        assert!(error_text(&mut peer).contains("takes none"));
    }

    #[test]
    fn nonsense_is_told_and_closed() {
        let (mut link, mut peer) = greeted_link();
        peer.send(&"dance", None).unwrap();
        assert!(link.receive().is_empty());
        assert!(error_text(&mut peer).contains("not a message"));
        assert!(link.connection().is_none());
    }

    #[test]
    fn a_flood_gets_one_turn_at_a_time() {
        let (mut link, peer) = greeted_link();
        for nonce in 0..40 {
            peer.send(&ToInstance::Ping { nonce }, None).unwrap();
        }
        assert_eq!(link.receive().len(), MESSAGES_PER_TURN);
        assert_eq!(link.receive().len(), MESSAGES_PER_TURN);
        assert_eq!(link.receive().len(), 40 - 2 * MESSAGES_PER_TURN);
    }

    #[test]
    fn a_second_usbpolicyd_is_told_and_the_first_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.sock");
        let mut link = PolicyLink::listening(Listener::bind(&path, 0o660).unwrap(), allowed());
        let first = Channel::dial(&path).unwrap();
        assert!(link.accept());
        let mut second = Channel::dial(&path).unwrap();
        assert!(!link.accept());
        assert!(error_text(&mut second).contains("another usbpolicyd"));
        first.send(&ToInstance::Hello { version: PROTOCOL_VERSION }, None).unwrap();
        assert!(matches!(link.receive()[..], [Request::Hello]));
    }

    #[test]
    fn after_a_killed_usbpolicyd_the_next_one_gets_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.sock");
        let mut link = PolicyLink::listening(Listener::bind(&path, 0o660).unwrap(), allowed());
        let first = Channel::dial(&path).unwrap();
        assert!(link.accept());
        drop(first);
        let _second = Channel::dial(&path).unwrap();
        assert!(link.receive().is_empty());
        assert!(link.accept());
    }

    #[test]
    fn strangers_are_not_allowed() {
        let peer = UnixCredentials::new();
        let nobody = Allowed { uid: 4_000_000, gid: 4_000_000 };
        assert_eq!(nobody.has(&peer), peer.uid() == 0);
        assert!(allowed().has(&peer));
    }
}
