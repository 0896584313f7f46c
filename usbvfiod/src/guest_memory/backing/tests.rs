use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;

const SIZE: u64 = 0x4_0000;

fn memfd(seals: SealFlag) -> File {
    let file = File::from(
        memfd_create(c"guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).expect("memfd"),
    );
    file.set_len(SIZE).expect("length");
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("sealed");
    file
}

fn map() -> DmaMap {
    DmaMap { address: 0, size: SIZE, offset: 0, readable: true, writable: true }
}

fn inspect(file: &File) -> BackingFile {
    BackingFile::inspect(file.try_clone().expect("copy").into()).expect("a file")
}

/// Huge pages need an administrator's set-up, so the same code runs over small ones.
fn as_huge(file: &File) -> (Backing, Pipe) {
    let file = BackingFile { is_hugetlb: true, ..inspect(file) };
    (Backing::open(&file, &map()).expect("opened"), Pipe::new().expect("pipe"))
}

#[test]
fn only_what_cannot_shrink_is_mapped() {
    for (seals, is_mapped) in [
        (SealFlag::empty(), false),
        (SealFlag::F_SEAL_GROW, false),
        (SealFlag::F_SEAL_SHRINK, true),
        (SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL, true),
    ] {
        let backing = Backing::open(&inspect(&memfd(seals)), &map()).expect("opened");
        assert_eq!(matches!(backing, Backing::Mapped(_)), is_mapped, "{seals:?}");
    }
}

#[test]
fn huge_pages_are_written_through_the_pipe() {
    let file = memfd(SealFlag::empty());
    let (backing, pipe) = as_huge(&file);
    assert!(matches!(backing, Backing::HugeFile { .. }));
    let data: Vec<u8> = (0..150_000_u32).map(|n| n as u8).collect();
    backing.write(0x1001, &data, &pipe).expect("written");
    let mut back = vec![0; data.len()];
    backing.read(0x1001, &mut back).expect("read");
    assert_eq!(back, data);
}

#[test]
fn huge_pages_truncated_under_us_are_an_error_and_the_pipe_stays_clean() {
    let file = memfd(SealFlag::empty());
    let (backing, pipe) = as_huge(&file);
    file.set_len(0x1000).expect("truncated");
    assert!(backing.write(0x2000, &[7; 0x3000], &pipe).is_err());
    assert!(backing.write(0x800, &[8; 0x1000], &pipe).is_err(), "half of it is gone");
    backing.write(0x10, b"clean", &pipe).expect("still there");
    let mut data = [0; 5];
    backing.read(0x10, &mut data).expect("read");
    assert_eq!(&data, b"clean");
    assert!(backing.read(0x1000, &mut data).is_err());
}

#[test]
fn record_of_a_ring_is_written_whole() {
    for seals in [SealFlag::empty(), SealFlag::F_SEAL_SHRINK] {
        let file = memfd(seals);
        let (pipe, backing) =
            (Pipe::new().expect("pipe"), Backing::open(&inspect(&file), &map()).expect("opened"));
        let record: Vec<u8> = (1..=16).collect();
        backing.write(0x40, &record, &pipe).expect("written");
        let mut back = [0; 16];
        file.read_exact_at(&mut back, 0x40).expect("read");
        assert_eq!(back[..], record);
        backing.read(0x40, &mut back).expect("read");
        assert_eq!(back[..], record);
    }
}
