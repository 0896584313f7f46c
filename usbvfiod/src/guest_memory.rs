//! Guest memory: the table of what the client has mapped for us, and the copies in and out of it.
//!
//! The client and the guest decide every address. An access goes through only if all of its bytes are mapped with the
//! right to it; else nothing is copied. Nothing here keeps a reference to guest memory between two calls, so unmapping
//! takes effect at once, whatever is in flight: a transfer that ends later finds no memory and says so.
//!
//! What survives a hostile client: overlapping maps (`EEXIST`), maps without a file (taken, but every access
//! fails), files shorter than the map, files shortened later (`backing`), and too many maps or files.

mod backing;
mod batch;

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use nix::errno::Errno;

use self::backing::{Backing, BackingFile, Pipe};
use self::batch::Batch;
use crate::urb::{DmaFault, GuestMem, Segment, used, whole};
use crate::vfio_user::message::{DmaMap, DmaUnmap};

/// Most maps at a time. Cloud Hypervisor maps virtio-mem block by block, so this allows 32 GiB of 2 MiB blocks; the
/// table then takes about 2 MiB. (libvfio-user allows 65535, more than a process may have mappings by default.)
pub const MAX_MAPS: usize = 16384;
/// Most different files at a time; each takes one descriptor, however many maps lie in it.
const MAX_FILES: usize = 64;
/// Largest map, as in libvfio-user.
const MAX_MAP_SIZE: u64 = 8 << 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// Some guest physical addresses.
#[derive(Clone, Debug)]
struct Map {
    start: u64,
    /// Last address, so that a map may end at 2^64.
    last: u64,
    /// Offset of `start` in `backing`.
    offset: u64,
    readable: bool,
    writable: bool,
    backing: Backing,
}

impl Map {
    fn allows(&self, access: Access) -> bool {
        let has_right = match access {
            Access::Read => self.readable,
            Access::Write => self.writable,
        };
        has_right && !matches!(self.backing, Backing::Unreachable)
    }
}

/// The memory of the guest. One thread uses it. See the module's text.
#[derive(Debug)]
pub struct GuestMemory {
    /// Sorted by address, not overlapping.
    maps: Vec<Map>,
    /// Where the last lookup ended: most accesses go where the one before went.
    last_hit: Cell<usize>,
    files: Vec<BackingFile>,
    pipe: Pipe,
    batch: Batch,
    /// The operator was told about memory without a file.
    told: Cell<bool>,
}

impl GuestMemory {
    /// Without any memory.
    pub fn new() -> io::Result<Self> {
        let pipe = Pipe::new()?;
        Ok(Self {
            maps: Vec::new(),
            last_hit: Cell::new(0),
            files: Vec::new(),
            pipe,
            batch: Batch::new(),
            told: Cell::new(false),
        })
    }

    /// Takes memory from the client. Without a `file` the addresses are taken, but no access to them works.
    pub fn map(&mut self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), Errno> {
        let last =
            map.size.checked_sub(1).and_then(|len| map.address.checked_add(len)).ok_or(Errno::EINVAL)?;
        if map.size > MAX_MAP_SIZE {
            return Err(Errno::ENOSPC);
        }
        if self.maps.len() >= MAX_MAPS {
            return Err(Errno::EINVAL);
        }
        let at = self.first_ending_at_or_after(map.address);
        if self.maps.get(at).is_some_and(|next| next.start <= last) {
            return Err(Errno::EEXIST);
        }
        let backing = match file {
            Some(fd) => Backing::open(&self.share(BackingFile::inspect(fd)?)?, map)?,
            None => Backing::Unreachable,
        };
        common::limited!(
            debug,
            address = format_args!("{:#x}", map.address),
            size = map.size,
            kind = backing.kind(),
            "guest memory mapped"
        );
        let (readable, writable) = (map.readable, map.writable);
        self.maps.insert(at, Map { start: map.address, last, offset: 0, readable, writable, backing });
        Ok(())
    }

    /// Gives memory back. A map that is only partly meant keeps the rest; addresses that are not mapped are no error.
    pub fn unmap(&mut self, range: DmaUnmap) {
        match range {
            DmaUnmap::All => self.maps.clear(),
            DmaUnmap::Range { size: 0, .. } => {}
            DmaUnmap::Range { address, size } => self.cut(address, address.saturating_add(size - 1)),
        }
        let in_use = |file: &BackingFile| std::sync::Arc::strong_count(&file.file) > 1;
        self.files.retain(in_use);
        self.last_hit.set(0);
    }

    /// Number of maps.
    pub fn len(&self) -> usize {
        self.maps.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.maps.is_empty()
    }

    /// The descriptor we already have for the same file, so that a thousand maps of one file need one.
    fn share(&mut self, file: BackingFile) -> Result<BackingFile, Errno> {
        if let Some(known) = self.files.iter().find(|known| known.is_same(&file)) {
            // Its length may have changed since, so only the descriptor is shared.
            return Ok(file.with_descriptor_of(known));
        }
        self.files.retain(|file| std::sync::Arc::strong_count(&file.file) > 1);
        if self.files.len() >= MAX_FILES {
            return Err(Errno::EMFILE);
        }
        self.files.push(file.clone());
        Ok(file)
    }

    fn cut(&mut self, first: u64, last: u64) {
        let from = self.first_ending_at_or_after(first);
        let count = self.maps[from..].iter().take_while(|map| map.start <= last).count();
        let hit: Vec<Map> = self.maps.splice(from..from + count, None).collect();
        let mut kept = Vec::new();
        for map in hit {
            if map.start < first {
                kept.push(Map { last: first - 1, ..map.clone() });
            }
            if map.last > last {
                let start = last + 1;
                let offset = map.offset + (start - map.start);
                kept.push(Map { start, offset, ..map });
            }
        }
        // Cutting a map in two makes one more. A client that does so without end loses memory, not we.
        kept.truncate(MAX_MAPS.saturating_sub(self.maps.len()));
        self.maps.splice(from..from, kept);
    }

    /// Index of the first map whose last address is not below `address`.
    fn first_ending_at_or_after(&self, address: u64) -> usize {
        self.maps.partition_point(|map| map.last < address)
    }

    /// Index of the map that holds `address`.
    fn find(&self, address: u64) -> Option<usize> {
        let holds =
            |index: usize| self.maps.get(index).is_some_and(|map| (map.start..=map.last).contains(&address));
        let hit = self.last_hit.get();
        if holds(hit) {
            return Some(hit);
        }
        let index = self.first_ending_at_or_after(address);
        holds(index).then(|| {
            self.last_hit.set(index);
            index
        })
    }

    /// Calls `copy` for each map that the access touches, with the offset in its backing and the part of the buffer,
    /// after it has checked all of them. Bounded by the number of maps.
    fn each_part(
        &self,
        addr: u64,
        len: usize,
        access: Access,
        mut copy: impl FnMut(&Map, u64, Range<usize>) -> io::Result<()>,
    ) -> Result<(), DmaFault> {
        let fault = || DmaFault { addr, len };
        let Some(rest) = len.checked_sub(1) else { return Ok(()) };
        let last = addr.checked_add(rest as u64).ok_or_else(fault)?;
        let first_index = self.find(addr).ok_or_else(fault)?;
        let mut end_index = first_index;
        let mut next = addr;
        loop {
            let map = self.maps.get(end_index).filter(|map| map.start <= next).ok_or_else(fault)?;
            if !map.allows(access) {
                self.tell(map);
                return Err(fault());
            }
            end_index += 1;
            if map.last >= last {
                break;
            }
            next = map.last + 1;
        }
        let mut done = 0;
        for map in &self.maps[first_index..end_index] {
            let at = addr + done as u64;
            let part_len =
                usize::try_from(map.last - at).unwrap_or(usize::MAX).saturating_add(1).min(len - done);
            copy(map, map.offset + (at - map.start), done..done + part_len).map_err(|error| {
                common::limited!(debug, addr = format_args!("{at:#x}"), %error, "guest memory is gone");
                fault()
            })?;
            done += part_len;
        }
        Ok(())
    }

    fn tell(&self, map: &Map) {
        if matches!(map.backing, Backing::Unreachable) && !self.told.replace(true) {
            common::limited!(
                warn,
                address = format_args!("{:#x}", map.start),
                "the VMM gave guest memory without a file, DMA to it fails; \
                 use memory=…,shared=on (Cloud Hypervisor) or memory-backend-memfd,share=on (QEMU)"
            );
        }
    }
}

impl GuestMem for GuestMemory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault> {
        let len = buf.len();
        self.each_part(addr, len, Access::Read, |map, offset, part| map.backing.read(offset, &mut buf[part]))
    }

    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault> {
        self.each_part(addr, buf.len(), Access::Write, |map, offset, part| {
            map.backing.write(offset, &buf[part], &self.pipe)
        })
    }

    fn gather(&self, pieces: &[Segment], buf: &mut [u8]) -> Result<(), DmaFault> {
        self.copy_pieces(pieces, 0, Bytes::Into(buf))
    }

    fn scatter(&self, pieces: &[Segment], skip: usize, bytes: &[u8]) -> Result<(), DmaFault> {
        self.copy_pieces(pieces, skip, Bytes::From(bytes))
    }
}

/// Our side of a copy.
enum Bytes<'a> {
    /// Guest memory is read.
    Into(&'a mut [u8]),
    /// Guest memory is written.
    From(&'a [u8]),
}

impl Bytes<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Into(buf) => buf.len(),
            Self::From(bytes) => bytes.len(),
        }
    }

    fn access(&self) -> Access {
        match self {
            Self::Into(_) => Access::Read,
            Self::From(_) => Access::Write,
        }
    }

    /// Carries the batch out, which stands for this part of the bytes.
    fn carry_out(&mut self, batch: &Batch, part: Range<usize>) -> io::Result<()> {
        match self {
            Self::Into(buf) => batch.read(&mut buf[part]),
            Self::From(bytes) => batch.write(&bytes[part]),
        }
    }

    fn copy(&mut self, backing: &Backing, offset: u64, part: Range<usize>, pipe: &Pipe) -> io::Result<()> {
        match self {
            Self::Into(buf) => backing.read(offset, &mut buf[part]),
            Self::From(bytes) => backing.write(offset, &bytes[part], pipe),
        }
    }
}

impl GuestMemory {
    fn copy_pieces(&self, pieces: &[Segment], skip: usize, mut bytes: Bytes<'_>) -> Result<(), DmaFault> {
        let len = bytes.len();
        let batches = pieces.len() > 1 && self.batch.works();
        // How far we are, and from where on the bytes are those of the batch.
        let (mut done, mut batched) = (0, 0);
        for piece in used(pieces, skip, len) {
            let copied =
                self.each_part(piece.addr, piece.len as usize, bytes.access(), |map, offset, part| {
                    let part = done + part.start..done + part.end;
                    match map.backing.remote(offset).filter(|_| batches) {
                        Some(place) => {
                            if !self.batch.push(place, part.len()) {
                                return Ok(());
                            }
                            bytes.carry_out(&self.batch, batched..part.end)?;
                        }
                        None => {
                            bytes.carry_out(&self.batch, batched..part.start)?;
                            bytes.copy(&map.backing, offset, part.clone(), &self.pipe)?;
                        }
                    }
                    batched = part.end;
                    Ok(())
                });
            if let Err(fault) = copied {
                self.batch.forget();
                return Err(fault);
            }
            done += piece.len as usize;
        }
        let rest = bytes.carry_out(&self.batch, batched..done);
        rest.map_err(|_| DmaFault { addr: 0, len: done - batched })?;
        whole(done, len)
    }
}

#[cfg(test)]
mod tests;
