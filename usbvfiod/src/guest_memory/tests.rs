use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

use super::*;

const PAGE: u64 = 0x1000;

fn memfd(len: u64, seals: SealFlag) -> File {
    let file = File::from(
        memfd_create(c"guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).expect("memfd"),
    );
    file.set_len(len).expect("length");
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("sealed");
    file
}

fn both_kinds(len: u64) -> [File; 2] {
    [memfd(len, SealFlag::empty()), memfd(len, SealFlag::F_SEAL_SHRINK)]
}

fn copy_of(file: &File) -> Option<OwnedFd> {
    Some(file.try_clone().expect("copy").into())
}

fn rw(address: u64, size: u64, offset: u64) -> DmaMap {
    DmaMap { address, size, offset, readable: true, writable: true }
}

fn memory() -> GuestMemory {
    GuestMemory::new().expect("pipe")
}

#[test]
fn access_may_cross_adjacent_maps_of_different_files() {
    for (first, second) in both_kinds(PAGE).into_iter().zip(both_kinds(PAGE).into_iter().rev()) {
        let mut memory = memory();
        memory.map(&rw(0x10_0000, PAGE, 0), copy_of(&first)).expect("mapped");
        memory.map(&rw(0x10_1000, PAGE, 0), copy_of(&second)).expect("mapped");
        memory.write(0x10_0ffd, b"across").expect("written");
        let mut data = [0; 6];
        memory.read(0x10_0ffd, &mut data).expect("read");
        assert_eq!(&data, b"across");
        let mut half = [0; 3];
        second.read_exact_at(&mut half, 0).expect("in the second file");
        assert_eq!(&half, b"oss");
    }
}

#[test]
fn nothing_is_copied_when_a_byte_is_missing() {
    for file in both_kinds(2 * PAGE) {
        let mut memory = memory();
        memory.map(&rw(0, PAGE, 0), copy_of(&file)).expect("mapped");
        memory.map(&DmaMap { writable: false, ..rw(PAGE, PAGE, PAGE) }, copy_of(&file)).expect("mapped");
        assert_eq!(memory.write(PAGE - 2, &[7; 4]), Err(DmaFault { addr: PAGE - 2, len: 4 }));
        let mut data = [9; 8];
        assert!(memory.read(2 * PAGE - 4, &mut data).is_err());
        assert_eq!(data, [9; 8]);
        memory.read(PAGE - 4, &mut data).expect("readable");
        assert_eq!(data, [0; 8]);
    }
}

#[test]
fn addresses_that_wrap_fault() {
    let mut memory = memory();
    memory.map(&rw(u64::MAX - 0xfff, PAGE, 0), copy_of(&memfd(PAGE, SealFlag::empty()))).expect("mapped");
    memory.map(&rw(0, PAGE, 0), copy_of(&memfd(PAGE, SealFlag::empty()))).expect("mapped");
    let mut data = [0; 8];
    memory.read(u64::MAX - 7, &mut data).expect("the last bytes");
    assert!(memory.read(u64::MAX - 6, &mut data).is_err());
    assert!(memory.write(u64::MAX, &[1, 2]).is_err());
}

#[test]
fn access_of_no_bytes_works_anywhere() {
    let memory = memory();
    assert!(memory.read(0, &mut []).is_ok());
    assert!(memory.write(u64::MAX, &[]).is_ok());
}

#[test]
fn records_and_words_are_copied_right_at_any_alignment() {
    for file in both_kinds(PAGE) {
        let mut memory = memory();
        memory.map(&rw(0, PAGE, 0), copy_of(&file)).expect("mapped");
        for len in [1, 2, 4, 8, 12, 16, 17, 32] {
            for offset in 0..33 {
                let data: Vec<u8> = (0..len).map(|byte| (byte * 3 + offset + 1) as u8).collect();
                memory.write(offset as u64, &data).expect("written");
                let mut back = vec![0; len];
                memory.read(offset as u64, &mut back).expect("read");
                assert_eq!(back, data, "{len} at {offset}");
            }
        }
    }
}

#[test]
fn offset_that_is_no_multiple_of_a_page_still_works() {
    for file in both_kinds(2 * PAGE) {
        file.write_all_at(b"odd", 0x123).expect("written");
        let mut memory = memory();
        memory.map(&rw(0x5000, 0x100, 0x123), copy_of(&file)).expect("mapped");
        let mut data = [0; 3];
        memory.read(0x5000, &mut data).expect("read");
        assert_eq!(&data, b"odd");
    }
}

#[test]
fn same_file_twice_needs_one_descriptor_and_too_many_files_are_refused() {
    let mut memory = memory();
    let first = memfd(PAGE, SealFlag::empty());
    for index in 0..10 {
        memory.map(&rw(index * PAGE, PAGE, 0), copy_of(&first)).expect("mapped");
    }
    assert_eq!(memory.files.len(), 1);
    for index in 1..MAX_FILES as u64 {
        let file = memfd(PAGE, SealFlag::empty());
        memory.map(&rw((100 + index) * PAGE, PAGE, 0), copy_of(&file)).expect("mapped");
    }
    let one_more = memfd(PAGE, SealFlag::empty());
    assert_eq!(memory.map(&rw(1 << 40, PAGE, 0), copy_of(&one_more)), Err(Errno::EMFILE));
    memory.unmap(DmaUnmap::Range { address: 101 * PAGE, size: PAGE });
    memory.map(&rw(1 << 40, PAGE, 0), copy_of(&one_more)).expect("room again");
}

#[test]
fn file_that_grew_can_be_mapped_to_its_new_end() {
    let mut memory = memory();
    let file = memfd(PAGE, SealFlag::empty());
    memory.map(&rw(0, PAGE, 0), copy_of(&file)).expect("mapped");
    file.set_len(2 * PAGE).expect("grown");
    memory.map(&rw(PAGE, PAGE, PAGE), copy_of(&file)).expect("mapped");
    assert!(memory.write(2 * PAGE - 1, &[1]).is_ok());
}

#[test]
fn read_only_descriptor_is_refused_for_a_writable_map() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("rom");
    std::fs::write(&path, vec![3; PAGE as usize]).expect("written");
    let mut memory = memory();
    let file = File::open(&path).expect("opened");
    assert_eq!(memory.map(&rw(0, PAGE, 0), copy_of(&file)), Err(Errno::EACCES));
    memory.map(&DmaMap { writable: false, ..rw(0, PAGE, 0) }, copy_of(&file)).expect("mapped");
    let mut data = [0; 1];
    memory.read(9, &mut data).expect("read");
    assert_eq!(data, [3]);
}

#[test]
fn file_that_appends_is_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let file =
        File::options().append(true).read(true).create(true).open(dir.path().join("f")).expect("opened");
    file.set_len(PAGE).expect("length");
    assert_eq!(memory().map(&rw(0, PAGE, 0), copy_of(&file)), Err(Errno::EINVAL));
}

#[test]
fn cutting_maps_in_two_without_end_is_bounded() {
    let mut memory = memory();
    let pages = 2 * MAX_MAPS as u64 + 100;
    memory.map(&rw(0, pages * PAGE, 0), None).expect("mapped");
    for index in 0..MAX_MAPS as u64 + 50 {
        memory.unmap(DmaUnmap::Range { address: (2 * index + 1) * PAGE, size: PAGE });
    }
    assert!(memory.len() <= MAX_MAPS);
}

/// One map or unmap over 16 pages, by page numbers.
#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64),
    Unmap(u64, u64),
    All,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0_u64..16, 1_u64..6).prop_map(|(at, len)| Step::Map(at, len)),
        3 => (0_u64..16, 0_u64..8).prop_map(|(at, len)| Step::Unmap(at, len)),
        1 => Just(Step::All),
    ];
    prop::collection::vec(step, 0..40)
}

proptest! {
    /// The table against a model of one entry for each page: which page of the file is where.
    #[test]
    fn table_is_right_after_any_maps_and_unmaps(steps in steps(), is_sealed in any::<bool>()) {
        let [plain, sealed] = both_kinds(32 * PAGE);
        let file = if is_sealed { sealed } else { plain };
        for page in 0..32_u64 {
            file.write_all_at(&[page as u8 + 1], page * PAGE).expect("marked");
        }
        let mut memory = memory();
        let mut model: [Option<u64>; 32] = [None; 32];
        for step in steps {
            match step {
                Step::Map(at, len) => {
                    let range = at as usize..(at + len) as usize;
                    let is_free = model[range.clone()].iter().all(Option::is_none);
                    let result = memory.map(&rw(at * PAGE, len * PAGE, (at ^ 1) * PAGE), copy_of(&file));
                    prop_assert_eq!(result, if is_free { Ok(()) } else { Err(Errno::EEXIST) });
                    if is_free {
                        let pages = (0..len).map(|page| Some((at ^ 1) + page));
                        model[range].iter_mut().zip(pages).for_each(|(slot, page)| *slot = page);
                    }
                }
                Step::Unmap(at, len) => {
                    memory.unmap(DmaUnmap::Range { address: at * PAGE, size: len * PAGE });
                    model[at as usize..(at + len) as usize].fill(None);
                }
                Step::All => {
                    memory.unmap(DmaUnmap::All);
                    model.fill(None);
                }
            }
            for (page, expected) in model.iter().enumerate() {
                let mut mark = [0];
                let result = memory.read(page as u64 * PAGE, &mut mark);
                prop_assert_eq!(result.ok().map(|()| u64::from(mark[0]) - 1), *expected);
            }
        }
    }
}

/// Pages of guest memory that do not follow each other, each kind of backing among them.
fn scattered() -> (GuestMemory, [File; 2], Vec<Segment>) {
    let files = both_kinds(8 * PAGE);
    let mut memory = memory();
    memory.map(&rw(0, 8 * PAGE, 0), copy_of(&files[0])).expect("mapped");
    memory.map(&rw(8 * PAGE, 8 * PAGE, 0), copy_of(&files[1])).expect("mapped");
    let piece = |addr, len| Segment { addr, len };
    // One of them crosses the border between the files, one is empty.
    let pieces = vec![
        piece(5 * PAGE, 4096),
        piece(8 * PAGE - 100, 200),
        piece(2 * PAGE + 7, 1),
        piece(0, 0),
        piece(10 * PAGE, 3000),
        piece(3 * PAGE, 4096),
    ];
    (memory, files, pieces)
}

#[test]
fn pieces_are_gathered_and_scattered_in_their_order() {
    let (memory, _files, pieces) = scattered();
    let len: u32 = pieces.iter().map(|piece| piece.len).sum();
    let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();

    memory.scatter(&pieces, 0, &bytes).expect("scattered");

    let mut back = vec![0; bytes.len()];
    memory.gather(&pieces, &mut back).expect("gathered");
    assert_eq!(back, bytes);
    let mut at = 0;
    for piece in &pieces {
        let mut part = vec![0; piece.len as usize];
        memory.read(piece.addr, &mut part).expect("read");
        assert_eq!(part, bytes[at..at + part.len()], "{piece:?}");
        at += part.len();
    }
}

#[test]
fn scattering_begins_behind_what_is_skipped() {
    let (memory, _files, pieces) = scattered();
    memory.scatter(&pieces, 4096 + 150, &[7; 60]).expect("scattered");
    let mut data = [0; 52];
    memory.read(8 * PAGE + 49, &mut data).expect("read");
    assert_eq!((data[0], &data[1..51], data[51]), (0, &[7; 50][..], 0));
    memory.read(2 * PAGE + 7, &mut data[..1]).expect("read");
    assert_eq!(data[0], 7);
    memory.read(10 * PAGE + 8, &mut data[..2]).expect("read");
    assert_eq!(data[..2], [7, 0]);
}

#[test]
fn pieces_that_end_too_early_are_a_fault() {
    let (memory, _files, pieces) = scattered();
    let len: usize = pieces.iter().map(|piece| piece.len as usize).sum();
    assert!(memory.gather(&pieces, &mut vec![0; len + 1]).is_err());
    assert!(memory.scatter(&pieces, 1, &vec![0; len]).is_err());
    assert!(memory.scatter(&[], 0, &[]).is_ok());
}

#[test]
fn piece_outside_of_memory_is_a_fault_and_leaves_nothing_for_the_next() {
    let (memory, _files, mut pieces) = scattered();
    pieces[4].addr = 1 << 40;
    assert!(memory.scatter(&pieces, 0, &[9; 12000]).is_err());
    let two = [Segment { addr: 0, len: 4 }, Segment { addr: PAGE, len: 4 }];
    memory.scatter(&two, 0, &[1, 2, 3, 4, 5, 6, 7, 8]).expect("scattered");
    let mut back = [0; 8];
    memory.gather(&two, &mut back).expect("gathered");
    assert_eq!(back, [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn more_pieces_than_the_kernel_takes_at_once_are_copied() {
    let memory = {
        let mut memory = memory();
        memory.map(&rw(0, 0x10_0000, 0), copy_of(&memfd(0x10_0000, SealFlag::empty()))).expect("mapped");
        memory
    };
    let pieces: Vec<_> = (0..5000).map(|n| Segment { addr: (n * 7919) % 0x8_0000 * 2, len: 2 }).collect();
    let bytes: Vec<u8> = (0..10_000_u32).map(|n| (n % 241) as u8).collect();
    memory.scatter(&pieces, 0, &bytes).expect("scattered");
    let mut back = vec![0; bytes.len()];
    memory.gather(&pieces, &mut back).expect("gathered");
    assert_eq!(back, bytes);
}

#[test]
fn pieces_in_a_file_that_was_shortened_are_a_fault_and_no_signal() {
    let file = memfd(4 * PAGE, SealFlag::empty());
    let mut memory = memory();
    memory.map(&rw(0, 4 * PAGE, 0), copy_of(&file)).expect("mapped");
    let pieces = [Segment { addr: 0, len: 100 }, Segment { addr: 3 * PAGE, len: 100 }];
    memory.scatter(&pieces, 0, &[1; 200]).expect("all there");
    file.set_len(PAGE).expect("shortened");
    assert!(memory.scatter(&pieces, 0, &[2; 200]).is_err());
    assert!(memory.gather(&pieces, &mut [0; 200]).is_err());
    let mut first = [0; 1];
    memory.read(0, &mut first).expect("still there");
    assert_eq!(first, [2]);
}
