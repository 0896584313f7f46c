//! Payload in many pieces, copied by the kernel in one system call, to and from memory that we must not touch ourselves.
//!
//! `process_vm_readv` and `process_vm_writev` on our own process: a piece whose file has been shortened ends the call with
//! an error instead of a SIGBUS. Guest buffers are often pages all over the place, and a `pwrite` for each costs half
//! as much again (`docs/developer/speed.md`).

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

/// `UIO_MAXIOV`: pieces that one call takes.
const PIECES_MAX: usize = 1024;

/// The way for pieces. Empty between uses; kept so that a transfer allocates nothing.
#[derive(Debug)]
pub(super) struct Batch {
    pid: Pid,
    /// The kernel has the calls and lets us make them.
    works: bool,
    pieces: RefCell<Vec<RemoteIoVec>>,
}

impl Batch {
    pub(super) fn new() -> Self {
        let pid = Pid::this();
        let (probe, mut copy) = ([0x5a_u8; 8], [0_u8; 8]);
        let place = RemoteIoVec { base: probe.as_ptr() as usize, len: probe.len() };
        let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut copy)], &[place]);
        Self { pid, works: read == Ok(probe.len()) && copy == probe, pieces: RefCell::default() }
    }

    /// Whether it can be used (`CONFIG_CROSS_MEMORY_ATTACH`).
    pub(super) const fn works(&self) -> bool {
        self.works
    }

    /// Notes a piece that follows those before it. True when the batch is full and has to be carried out.
    pub(super) fn push(&self, base: usize, len: usize) -> bool {
        let mut pieces = self.pieces.borrow_mut();
        pieces.push(RemoteIoVec { base, len });
        pieces.len() == PIECES_MAX
    }

    /// Copies `bytes` to the pieces and forgets them.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        self.run(bytes.len(), |pieces| process_vm_writev(self.pid, &[IoSlice::new(bytes)], pieces))
    }

    /// Copies the pieces to `buf` and forgets them.
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<()> {
        self.run(buf.len(), |pieces| process_vm_readv(self.pid, &mut [IoSliceMut::new(buf)], pieces))
    }

    /// Forgets the pieces.
    pub(super) fn forget(&self) {
        self.pieces.borrow_mut().clear();
    }

    fn run(&self, len: usize, call: impl FnOnce(&[RemoteIoVec]) -> nix::Result<usize>) -> io::Result<()> {
        let mut pieces = self.pieces.borrow_mut();
        if pieces.is_empty() {
            return Ok(());
        }
        let done = call(&pieces);
        pieces.clear();
        // Less than all: a piece in the middle is gone.
        if done? == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}
