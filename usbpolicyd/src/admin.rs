//! The socket for `usbpolicyctl`: who is calling, what may they do, and a queue to each that never holds up the daemon.
//!
//! SOCK_SEQPACKET, one JSON object a packet ([`wire`]). A request is one packet, its answer is any number of packets
//! and an `end`. Anybody may connect; who is no member of one of the groups gets a refusal that names them. What a
//! request does is the daemon's business (`daemon/answer.rs`).

pub mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use common::channel::{ChannelError, Listener};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use nix::unistd::{Gid, Group, Uid, User, geteuid, getgrouplist};

use wire::{PACKET_MAX, Reply, Request};

/// Most clients at once.
const CLIENTS_MAX: usize = 32;
/// Most clients of one user, root excepted, so that nobody shuts others out.
const CLIENTS_PER_USER: usize = 8;
/// Most bytes that wait for one client. Who reads slower than this is cut off.
const QUEUE_MAX: usize = 4 << 20;

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Nothing.
    Nobody,
    /// Look (`usbpolicy-view`).
    View,
    /// Also give and take devices (`usbpolicy-operate`).
    Operate,
    /// Everything (`usbpolicy-admin`, root).
    Admin,
}

impl Role {
    /// The group that has it, for messages.
    pub const fn group(self) -> &'static str {
        match self {
            Self::Nobody | Self::View => "usbpolicy-view",
            Self::Operate => "usbpolicy-operate",
            Self::Admin => "usbpolicy-admin",
        }
    }
}

/// One connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(u64);

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    uid: Uid,
    role: Role,
    actor: String,
    queue: VecDeque<Vec<u8>>,
    queued_bytes: usize,
    watches: bool,
    /// It came by the socket for events: it is told, and may say nothing.
    only_listens: bool,
}

/// What there is to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The socket for requests.
    Commands,
    /// The socket for those who only want to be told what happens.
    Events,
    /// A connection.
    Client(ClientId),
}

/// Both listeners and all connections.
#[derive(Debug)]
pub struct Admin {
    commands: Listener,
    events: Listener,
    clients: BTreeMap<ClientId, Client>,
    groups: Vec<(Gid, Role)>,
    next: u64,
}

impl Admin {
    /// Binds `path`. A stale socket is replaced; a live one is an error.
    pub fn bind(path: &Path) -> Result<Listener, ChannelError> {
        Listener::bind(path, 0o666)
    }

    /// Takes the listeners, made by [`Self::bind`] or by systemd.
    pub fn new(commands: Listener, events: Listener) -> Self {
        // Read once, before the sandbox closes.
        let roles = [Role::View, Role::Operate, Role::Admin];
        let groups =
            roles.into_iter().filter_map(|role| Some((Group::from_name(role.group()).ok()??.gid, role)));
        Self { commands, events, clients: BTreeMap::new(), groups: groups.collect(), next: 0 }
    }

    /// The listeners, then each client; `true` for those that have something to be sent.
    pub fn sockets(&self) -> impl Iterator<Item = (Place, BorrowedFd<'_>, bool)> {
        let clients = self.clients.iter();
        let clients =
            clients.map(|(id, client)| (Place::Client(*id), client.socket.as_fd(), !client.queue.is_empty()));
        let listeners = [(Place::Commands, &self.commands), (Place::Events, &self.events)];
        listeners.into_iter().map(|(place, listener)| (place, listener.as_fd(), false)).chain(clients)
    }

    /// Takes the connections that wait at a listener.
    pub fn accept(&mut self, place: Place) {
        let only_listens = place == Place::Events;
        for _ in 0..CLIENTS_MAX {
            let listener = if only_listens { &self.events } else { &self.commands };
            let Ok(Some(channel)) = listener.accept() else { return };
            let Ok(peer) = channel.peer() else { continue };
            let socket = OwnedFd::from(channel);
            let uid = Uid::from_raw(peer.uid());
            let same = self.clients.values().filter(|client| client.uid == uid).count();
            if self.clients.len() >= CLIENTS_MAX || (!uid.is_root() && same >= CLIENTS_PER_USER) {
                tracing::warn!(%uid, "too many usbpolicyctl at once; one was turned away");
                continue;
            }
            let (role, actor) = self.look_up(uid, Gid::from_raw(peer.gid()));
            self.next += 1;
            let id = ClientId(self.next);
            let watches = only_listens && role >= Role::View;
            let queue = VecDeque::new();
            let refusal =
                format!("{actor} may not look: it needs membership in group {}", Role::View.group());
            let client = Client { socket, uid, role, actor, queue, queued_bytes: 0, watches, only_listens };
            self.clients.insert(id, client);
            if only_listens && !watches {
                self.send(id, &Reply::End { ok: false, text: refusal });
                self.clients.remove(&id);
            }
        }
    }

    /// What a user may do, and their name.
    fn look_up(&self, uid: Uid, gid: Gid) -> (Role, String) {
        let user = User::from_uid(uid).ok().flatten();
        let name = user.as_ref().map_or_else(|| format!("uid {uid}"), |user| user.name.clone());
        if uid.is_root() || uid == geteuid() {
            return (Role::Admin, name);
        }
        let c_name = user.and_then(|user| std::ffi::CString::new(user.name).ok());
        let groups = c_name.and_then(|name| getgrouplist(&name, gid).ok()).unwrap_or_else(|| vec![gid]);
        let roles = self.groups.iter().filter(|(group, _)| groups.contains(group)).map(|(_, role)| *role);
        (roles.max().unwrap_or(Role::Nobody), name)
    }

    /// Takes one request of a client. A client that breaks the rules, or is gone, is closed.
    pub fn receive(&mut self, id: ClientId) -> Option<Request> {
        let client = self.clients.get(&id)?;
        let mut buffer = vec![0; PACKET_MAX];
        let mut parts = [IoSliceMut::new(&mut buffer)];
        // Without room for control data, files that come along are closed by the kernel.
        let got = recvmsg::<()>(client.socket.as_raw_fd(), &mut parts, None, MsgFlags::MSG_DONTWAIT);
        let length = match got {
            Ok(message) if message.bytes > 0 && !message.flags.contains(MsgFlags::MSG_TRUNC) => message.bytes,
            Err(Errno::EAGAIN | Errno::EINTR) => return None,
            _ => {
                self.clients.remove(&id);
                return None;
            }
        };
        if client.only_listens {
            self.clients.remove(&id);
            return None;
        }
        match serde_json::from_slice(&buffer[..length]) {
            Ok(request) => Some(request),
            Err(error) => {
                let text =
                    format!("not a request this daemon knows ({error}); install both from one release");
                self.send(id, &Reply::End { ok: false, text });
                None
            }
        }
    }

    /// Who a client is and what they may do.
    pub fn caller(&self, id: ClientId) -> Option<(Role, &str)> {
        let client = self.clients.get(&id)?;
        Some((client.role, &client.actor))
    }

    /// Queues a packet for a client and sends what can be sent.
    pub fn send(&mut self, id: ClientId, reply: &Reply) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Ok(packet) = serde_json::to_vec(reply) else { return };
        client.queued_bytes = client.queued_bytes.saturating_add(packet.len());
        client.queue.push_back(packet);
        if client.queued_bytes > QUEUE_MAX {
            tracing::warn!(actor = client.actor, "a usbpolicyctl does not read; cut off");
            self.clients.remove(&id);
            return;
        }
        self.flush(id);
    }

    /// Sends what waits for a client, as far as it reads.
    pub fn flush(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        while let Some(packet) = client.queue.front() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(client.socket.as_raw_fd(), &[IoSlice::new(packet)], &[], flags, None) {
                Ok(_) => {
                    client.queued_bytes = client.queued_bytes.saturating_sub(packet.len());
                    client.queue.pop_front();
                }
                Err(Errno::EAGAIN | Errno::ENOBUFS) => return,
                Err(_) => {
                    self.clients.remove(&id);
                    return;
                }
            }
        }
    }

    /// From now on this client gets each new audit entry.
    pub fn watch(&mut self, id: ClientId) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.watches = true;
        }
    }

    /// Clients that get each new audit entry.
    pub fn watchers(&self) -> Vec<ClientId> {
        self.clients.iter().filter(|(_, client)| client.watches).map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use common::channel::Channel;

    use super::*;

    /// Both sockets, and a client of one of them whose connection was accepted.
    fn connected(place: Place) -> (tempfile::TempDir, Admin, Channel) {
        let dir = tempfile::tempdir().unwrap();
        let (commands, events) = (dir.path().join("admin.sock"), dir.path().join("events.sock"));
        let mut admin = Admin::new(Admin::bind(&commands).unwrap(), Admin::bind(&events).unwrap());
        let client = Channel::dial(if place == Place::Events { &events } else { &commands }).unwrap();
        admin.accept(place);
        (dir, admin, client)
    }

    fn only_client(admin: &Admin) -> Option<ClientId> {
        admin.clients.keys().next().copied()
    }

    #[test]
    fn who_connects_to_the_events_socket_is_told_without_asking() {
        let (_dir, admin, _client) = connected(Place::Events);
        assert_eq!(admin.watchers(), [only_client(&admin).unwrap()]);
    }

    #[test]
    fn who_connects_to_the_admin_socket_is_told_when_they_ask() {
        let (_dir, mut admin, client) = connected(Place::Commands);
        assert!(admin.watchers().is_empty());
        client.send(&Request::Watch, None).unwrap();
        let id = only_client(&admin).unwrap();
        assert_eq!(admin.receive(id), Some(Request::Watch));
    }

    #[test]
    fn request_on_the_events_socket_is_not_heard_and_closes_it() {
        let (_dir, mut admin, client) = connected(Place::Events);
        client.send(&Request::Reload, None).unwrap();
        let id = only_client(&admin).unwrap();
        assert_eq!(admin.receive(id), None);
        assert_eq!(only_client(&admin), None);
    }

    #[test]
    fn user_in_none_of_the_groups_may_do_nothing() {
        let (_dir, admin, _client) = connected(Place::Commands);
        assert_eq!(admin.look_up(Uid::from_raw(4_000_000), Gid::from_raw(4_000_000)).0, Role::Nobody);
    }
}
