use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;

use super::*;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().expect("directory")
}

#[test]
fn fresh_path_is_bound() {
    let dir = dir();
    let path = dir.path().join("s");
    let listener = Listener::bind(&path).expect("bound");
    assert!(listener.accept().expect("no error").is_none());
    let _client = UnixStream::connect(&path).expect("connected");
    assert!(listener.accept().expect("no error").is_some());
}

#[test]
fn stale_socket_is_replaced() {
    let dir = dir();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).expect("bound"));
    let listener = Listener::bind(&path).expect("bound again");
    let _client = UnixStream::connect(&path).expect("connected");
    assert!(listener.accept().expect("no error").is_some());
}

#[test]
fn live_socket_is_left_alone() {
    let dir = dir();
    let path = dir.path().join("s");
    let theirs = UnixListener::bind(&path).expect("bound");
    let error = Listener::bind(&path).expect_err("live");
    assert!(matches!(error, ListenError::Live { .. }), "{error}");
    theirs.set_nonblocking(true).expect("set");
    assert!(UnixStream::connect(&path).is_ok(), "still theirs");
}

#[test]
fn file_that_is_no_socket_is_left_alone() {
    let dir = dir();
    let path = dir.path().join("s");
    std::fs::write(&path, b"precious").expect("written");
    let error = Listener::bind(&path).expect_err("a file");
    assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read(&path).expect("read"), b"precious");
}

#[test]
fn symbolic_link_is_not_followed_into_removal() {
    let dir = dir();
    let (target, link) = (dir.path().join("t"), dir.path().join("l"));
    drop(UnixListener::bind(&target).expect("bound"));
    std::os::unix::fs::symlink(&target, &link).expect("linked");
    assert!(matches!(Listener::bind(&link), Err(ListenError::NotASocket { .. })));
    assert!(target.exists());
}

#[test]
fn missing_directory_is_named() {
    let error = Listener::bind(Path::new("/nowhere/at/all")).expect_err("no directory");
    assert_eq!(error.to_string(), "cannot listen on /nowhere/at/all");
}

#[test]
fn inherited_listener_and_connection_are_told_apart() {
    let dir = dir();
    let theirs = UnixListener::bind(dir.path().join("s")).expect("bound");
    assert!(matches!(inherit(theirs.as_raw_fd()), Ok(Inherited::Listener(_))));
    let (ours, _client) = UnixStream::pair().expect("pair");
    assert!(matches!(inherit(ours.as_raw_fd()), Ok(Inherited::Connection(_))));
}

#[test]
fn inherited_number_that_is_of_no_use_is_refused() {
    let file = std::fs::File::open("/dev/null").expect("null");
    let datagram = std::os::unix::net::UnixDatagram::unbound().expect("socket");
    for number in [-1, 1_000_000, file.as_raw_fd(), datagram.as_raw_fd()] {
        let error = inherit(number).expect_err("of no use");
        assert!(error.to_string().contains(&number.to_string()), "{error}");
    }
}

#[test]
fn hang_up_is_seen_behind_unread_bytes() {
    let (ours, client) = UnixStream::pair().expect("pair");
    let connection = Connection::from(ours);
    io::Write::write_all(&mut &client, b"unread").expect("written");
    assert!(!connection.has_hung_up());
    drop(client);
    assert!(connection.has_hung_up());
}

#[test]
fn received_descriptors_close_on_exec() {
    let (ours, client) = UnixStream::pair().expect("pair");
    let mut connection = Connection::from(ours);
    let mut session = Session::new(crate::pci::layout(1), 0);
    let file = std::fs::File::open("/dev/null").expect("null");
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    assert!(control.push(net::SendAncillaryMessage::ScmRights(&fds)));
    let header = [1_u8, 0, 1, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    net::sendmsg(&client, &[IoSlice::new(&header)], &mut control, SendFlags::empty()).expect("sent");
    assert_eq!(connection.receive(&mut session).expect("received"), Received::Bytes);
    let frame = session.inbox().pop().expect("a message");
    let flags = rustix::io::fcntl_getfd(&frame.fds[0]).expect("flags");
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}
