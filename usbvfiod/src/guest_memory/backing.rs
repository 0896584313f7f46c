//! The bytes behind a piece of guest memory, reached without ever risking SIGBUS.
//!
//! A mapping of a file that its owner shortens kills whoever touches it. So a file is mapped only when it is sealed
//! against shrinking (`F_SEAL_SHRINK`; QEMU's `memory-backend-memfd` is, by default), and all others (Cloud Hypervisor's)
//! are reached by system calls, which answer with an error; there is no window between check and use. The payload is
//! still copied once. One piece goes by `pread` and `pwrite`; payload in several pieces goes by one call for all of them,
//! see [`super::batch`]. A signal handler that maps zeros over the hole would save the calls, and would need `unsafe` and
//! a table shared with the loop; `docs/developer/speed.md` has the prices.
//!
//! hugetlbfs cannot be written by `pwrite` (`fs/hugetlbfs/inode.c` has no `write_iter`). There the bytes go through a
//! pipe and `read` puts them into the mapping, so that the kernel meets the hole and says EFAULT.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use rustix::fs::{FileType, OFlags, SealFlags};
use vm_memory::{Bytes, FileOffset, MmapRegion, ReadVolatile, VolatileMemory};

use crate::vfio_user::message::DmaMap;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// Bytes through the pipe at once; a pipe holds at least 64 KiB.
const PIPE_CHUNK: usize = 16 << 10;
/// A TRB or another record whose last dword says that the rest is valid (xHCI 1.2 §4.9.2, cycle bit).
const RECORD: usize = 16;
const RECORD_BODY: usize = 12;

/// A file that guest memory lies in. Cheap to clone; the descriptor closes with the last one.
#[derive(Clone, Debug)]
pub(super) struct BackingFile {
    pub(super) file: Arc<File>,
    identity: Identity,
    len: u64,
    is_sealed: bool,
    is_hugetlb: bool,
}

/// What makes two descriptors the same file for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    readable: bool,
    writable: bool,
}

impl BackingFile {
    /// Whether the same file was opened the same way.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.identity == other.identity
    }

    /// The same knowledge with the other's descriptor; ours closes.
    pub(super) fn with_descriptor_of(self, other: &Self) -> Self {
        Self { file: Arc::clone(&other.file), ..self }
    }

    /// Looks at what came with DMA_MAP. Only regular files (memfd, tmpfs, hugetlbfs, disk) are guest memory; a device
    /// could have reads with effects, or be another device's registers.
    pub(super) fn inspect(fd: OwnedFd) -> Result<Self, Errno> {
        let errno = |error: rustix::io::Errno| Errno::from_raw(error.raw_os_error());
        let stat = rustix::fs::fstat(&fd).map_err(errno)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::EINVAL);
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(errno)?;
        if flags.contains(OFlags::APPEND) || flags.contains(OFlags::PATH) {
            return Err(Errno::EINVAL);
        }
        let access = flags & OFlags::RWMODE;
        let seals = rustix::fs::fcntl_get_seals(fd.as_fd()).unwrap_or(SealFlags::empty());
        let file_system = rustix::fs::fstatfs(&fd).map_err(errno)?;
        Ok(Self {
            identity: Identity {
                device: stat.st_dev,
                inode: stat.st_ino,
                readable: access != OFlags::WRONLY,
                writable: access != OFlags::RDONLY,
            },
            len: u64::try_from(stat.st_size).unwrap_or(0),
            is_sealed: seals.contains(SealFlags::SHRINK),
            is_hugetlb: file_system.f_type as u64 == HUGETLBFS_MAGIC,
            file: Arc::new(File::from(fd)),
        })
    }
}

/// Where the bytes of a map are. Offsets count from the start of the map as the client gave it.
#[derive(Clone, Debug)]
pub(super) enum Backing {
    /// Nowhere that we can reach: the client gave no file.
    Unreachable,
    /// In a file that cannot shrink, mapped.
    Mapped(Arc<MmapRegion>),
    /// In a file that could shrink; `start` is where the map begins in it. The mapping is for the kernel alone, which
    /// may meet a hole in it ([`super::batch`]); we never touch it.
    File { file: BackingFile, start: u64, mapping: Option<Arc<MmapRegion>> },
    /// In huge pages that could shrink: read as a file, written through a pipe.
    HugeFile { file: BackingFile, start: u64, mapping: Arc<MmapRegion> },
}

impl Backing {
    /// Opens `map` in `file`. Errors are the client's to hear.
    pub(super) fn open(file: &BackingFile, map: &DmaMap) -> Result<Self, Errno> {
        let end = map.offset.checked_add(map.size).ok_or(Errno::EINVAL)?;
        if end > file.len {
            return Err(Errno::EINVAL);
        }
        if !file.identity.readable || (map.writable && !file.identity.writable) {
            return Err(Errno::EACCES);
        }
        let mapping = || {
            let prot = libc::PROT_READ | if map.writable { libc::PROT_WRITE } else { 0 };
            let offset = FileOffset::from_arc(Arc::clone(&file.file), map.offset);
            let size = usize::try_from(map.size).map_err(|_| Errno::ENOMEM)?;
            let region = MmapRegion::build(Some(offset), size, prot, libc::MAP_SHARED | libc::MAP_NORESERVE);
            region.map(Arc::new).map_err(|_| Errno::ENOMEM)
        };
        match mapping() {
            Ok(mapping) if file.is_sealed => Ok(Self::Mapped(mapping)),
            Err(errno) if file.is_hugetlb && !file.is_sealed => Err(errno),
            Ok(mapping) if file.is_hugetlb => {
                Ok(Self::HugeFile { file: file.clone(), start: map.offset, mapping })
            }
            // An offset that is not a multiple of the page size cannot be mapped, but still be read.
            mapping => Ok(Self::File { file: file.clone(), start: map.offset, mapping: mapping.ok() }),
        }
    }

    /// Where `offset` is in our address space, for the kernel to copy there by [`super::batch`]. None where a copy of
    /// our own is better, or there is no such place.
    pub(super) fn remote(&self, offset: u64) -> Option<usize> {
        let (Self::File { mapping: Some(mapping), .. } | Self::HugeFile { mapping, .. }) = self else {
            return None;
        };
        (mapping.as_ptr() as usize).checked_add(usize::try_from(offset).ok()?)
    }

    /// For the log. (`Debug` of a file looks into /proc, which the sandbox does not allow.)
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Unreachable => "no file",
            Self::Mapped(_) => "mapped",
            Self::File { .. } => "file",
            Self::HugeFile { .. } => "huge pages, file",
        }
    }

    /// Copies from `offset` on. The caller has checked that the map has these bytes.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Unreachable => Err(io::ErrorKind::NotFound.into()),
            Self::Mapped(region) => read_mapped(region, offset, buf),
            Self::File { file, start, .. } | Self::HugeFile { file, start, .. } => {
                file.file.read_exact_at(buf, start + offset)
            }
        }
    }

    /// Copies to `offset`. The caller has checked that the map has these bytes and may be written.
    pub(super) fn write(&self, offset: u64, buf: &[u8], pipe: &Pipe) -> io::Result<()> {
        if let Self::Mapped(region) = self {
            return write_mapped(region, offset, buf);
        }
        let (body, last) = match buf.len() {
            RECORD => buf.split_at(RECORD_BODY),
            _ => (buf, &[][..]),
        };
        for (part, at) in [(body, offset), (last, offset + body.len() as u64)] {
            match self {
                Self::Unreachable => return Err(io::ErrorKind::NotFound.into()),
                Self::Mapped(_) => {}
                Self::File { file, start, .. } => file.file.write_all_at(part, start + at)?,
                Self::HugeFile { mapping, .. } => pipe.copy(part, mapping, at)?,
            }
        }
        Ok(())
    }
}

/// A record is read from its last dword backwards, so that a valid one is whole. Single dwords and qwords are not torn.
/// (Rings do not count on it: [`crate::xhci`] reads a TRB again once it has seen that it is valid.)
fn read_mapped(region: &MmapRegion, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let slice = region.get_slice(index(offset)?, buf.len()).map_err(io::Error::other)?;
    let is_aligned = |to: u64| offset.is_multiple_of(to);
    match buf.len() {
        RECORD if is_aligned(4) => {
            let last: u32 = slice.load(RECORD_BODY, Ordering::Acquire).map_err(io::Error::other)?;
            let body = slice.subslice(0, RECORD_BODY).map_err(io::Error::other)?;
            body.copy_to(&mut buf[..RECORD_BODY]);
            buf[RECORD_BODY..].copy_from_slice(&last.to_ne_bytes());
        }
        8 if is_aligned(8) => {
            let value: u64 = slice.load(0, Ordering::Acquire).map_err(io::Error::other)?;
            buf.copy_from_slice(&value.to_ne_bytes());
        }
        4 if is_aligned(4) => {
            let value: u32 = slice.load(0, Ordering::Acquire).map_err(io::Error::other)?;
            buf.copy_from_slice(&value.to_ne_bytes());
        }
        _ => {
            slice.copy_to(buf);
        }
    }
    Ok(())
}

/// The mirror image: the last dword of a record is written last.
fn write_mapped(region: &MmapRegion, offset: u64, buf: &[u8]) -> io::Result<()> {
    let slice = region.get_slice(index(offset)?, buf.len()).map_err(io::Error::other)?;
    let dword = |at: usize| u32::from_ne_bytes([buf[at], buf[at + 1], buf[at + 2], buf[at + 3]]);
    let is_aligned = |to: u64| offset.is_multiple_of(to);
    match buf.len() {
        RECORD if is_aligned(4) => {
            slice.subslice(0, RECORD_BODY).map_err(io::Error::other)?.copy_from(&buf[..RECORD_BODY]);
            slice.store(dword(RECORD_BODY), RECORD_BODY, Ordering::Release).map_err(io::Error::other)
        }
        8 if is_aligned(8) => {
            let value = u64::from(dword(0)) | u64::from(dword(4)) << 32;
            slice.store(value, 0, Ordering::Release).map_err(io::Error::other)
        }
        4 if is_aligned(4) => slice.store(dword(0), 0, Ordering::Release).map_err(io::Error::other),
        _ => {
            slice.copy_from(buf);
            Ok(())
        }
    }
}

fn index(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// The way into huge pages. Empty between uses.
#[derive(Debug)]
pub(super) struct Pipe {
    reader: File,
    writer: File,
}

impl Pipe {
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)?;
        Ok(Self { reader: reader.into(), writer: writer.into() })
    }

    fn copy(&self, buf: &[u8], mapping: &MmapRegion, offset: u64) -> io::Result<()> {
        let mut at = index(offset)?;
        for chunk in buf.chunks(PIPE_CHUNK) {
            (&self.writer).write_all(chunk)?;
            let slice = mapping.get_slice(at, chunk.len()).map_err(io::Error::other)?;
            if let Err(error) =
                (&self.reader).read_exact_volatile(&mut slice.offset(0).map_err(io::Error::other)?)
            {
                self.empty();
                return Err(io::Error::other(error));
            }
            at += chunk.len();
        }
        Ok(())
    }

    /// Throws away what a failed copy left: at most a chunk.
    fn empty(&self) {
        let mut left = [0; 4096];
        while matches!((&self.reader).read(&mut left), Ok(1..)) {}
    }
}

#[cfg(test)]
mod tests;
