use std::io::Read;
use std::os::unix::net::UnixStream;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;

/// An event fd and a copy for the vector. Blocking, as a careless client makes it.
fn eventfd(value: u32) -> (EventFd, OwnedFd) {
    let ours = EventFd::from_value_and_flags(value, EfdFlags::EFD_CLOEXEC).expect("eventfd");
    let theirs = ours.as_fd().try_clone_to_owned().expect("copy");
    (ours, theirs)
}

fn assign(msix: &mut Msix, start: u16, eventfds: Vec<OwnedFd>) {
    msix.apply(IrqChange::Assign { start, eventfds });
}

#[test]
fn vectors_that_do_not_exist_are_ignored() {
    let mut msix = Msix::new(2);
    msix.signal(2);
    msix.signal(u16::MAX);
    let (ours, theirs) = eventfd(0);
    assign(&mut msix, 5, vec![theirs]);
    msix.apply(IrqChange::Deassign { start: 1, count: u16::MAX });
    msix.apply(IrqChange::Mask(vec![7, u16::MAX]));
    msix.apply(IrqChange::Trigger(vec![7]));
    drop(msix);
    ours.write(1).expect("written");
    assert_eq!(ours.read().expect("only that"), 1);
}

#[test]
fn full_counter_does_not_block() {
    let mut msix = Msix::new(1);
    let (ours, theirs) = eventfd(0);
    ours.write(u64::MAX - 1).expect("filled");
    assign(&mut msix, 0, vec![theirs]);
    msix.signal(0);
    assert_eq!(ours.read().expect("read"), u64::MAX - 1);
}

#[test]
fn pipe_passed_off_as_an_eventfd_does_not_block_and_is_dropped_when_broken() {
    let mut msix = Msix::new(1);
    let (mut ours, theirs) = UnixStream::pair().expect("pair");
    assign(&mut msix, 0, vec![theirs.into()]);
    for _ in 0..100_000 {
        msix.signal(0);
    }
    assert!(ours.read(&mut [0; 8]).is_ok());
    drop(ours);
    msix.signal(0);
    assert!(msix.vectors[0].eventfd.is_none());
}

#[test]
fn pending_vector_is_signalled_once_when_the_eventfd_comes() {
    let mut msix = Msix::new(1);
    msix.signal(0);
    msix.signal(0);
    let (ours, theirs) = eventfd(0);
    assign(&mut msix, 0, vec![theirs]);
    assert_eq!(ours.read().expect("signalled"), 1);
}

#[test]
fn eventfd_swapped_while_masked_gets_the_pending_interrupt() {
    let mut msix = Msix::new(1);
    let (old, theirs) = eventfd(0);
    assign(&mut msix, 0, vec![theirs]);
    msix.apply(IrqChange::Mask(vec![0]));
    msix.signal(0);
    let (new, theirs) = eventfd(0);
    assign(&mut msix, 0, vec![theirs]);
    msix.apply(IrqChange::Unmask(vec![0]));
    assert!(old.read().is_err());
    assert_eq!(new.read().expect("signalled"), 1);
}

#[test]
fn disconnect_closes_eventfds_and_forgets_what_was_pending() {
    let mut msix = Msix::new(2);
    let (mut ours, theirs) = UnixStream::pair().expect("pair");
    assign(&mut msix, 0, vec![theirs.into()]);
    msix.signal(1);
    msix.disconnect();
    assert!(matches!(ours.read(&mut [0]), Ok(0)), "closed");
    let (later, theirs) = eventfd(0);
    assign(&mut msix, 1, vec![theirs]);
    assert!(later.as_fd().try_clone_to_owned().is_ok() && later.read().is_err());
}

#[test]
fn reset_masks_the_table_and_keeps_the_eventfds() {
    let mut msix = Msix::new(1);
    let (ours, theirs) = eventfd(0);
    assign(&mut msix, 0, vec![theirs]);
    msix.write(0, &[0; 16]);
    msix.reset();
    let mut control = [0; 4];
    msix.read(12, &mut control);
    assert_eq!(control, [1, 0, 0, 0]);
    msix.signal(0);
    assert_eq!(ours.read().expect("signalled"), 1);
}

#[test]
fn bar_is_read_and_written_bytewise_anywhere() {
    let mut msix = Msix::new(2);
    for offset in [0, 1, 15, 31, 32, 4095, 4096, 8191, 8192, u64::MAX - 2, u64::MAX] {
        let mut data = [0xaa; 9];
        msix.write(offset, &[0xff; 9]);
        msix.read(offset, &mut data);
    }
    msix.write(13, &[0xff; 6]);
    let mut data = [0; 7];
    msix.read(12, &mut data);
    assert_eq!(data, [1, 0, 0, 0, 0xfc, 0xff, 0xff]);
}

#[test]
fn number_of_vectors_is_kept_within_the_table() {
    assert_eq!(Msix::new(0).vectors.len(), 1);
    assert_eq!(Msix::new(u16::MAX).vectors.len(), usize::from(MAX_VECTORS));
    assert_eq!(Msix::new(u16::MAX).table.len(), PAGE as usize);
}
