//! Cuts the byte stream of a client into messages and keeps the file descriptors with the message they came with.
//!
//! Pure. The buffer is 16 KiB long and grows only for a longer message, to at most that and [`MAX_MESSAGE`]. A message that claims to be longer is kept as its header alone and the rest of it is thrown away as it comes, so that
//! the stream stays in step. A message may bring [`MAX_FDS`] descriptors; more are closed and the message is marked.
//!
//! Which message do descriptors belong to? The kernel ends a read behind the piece that carries them (`af_unix.c
//! unix_stream_read_generic`), so they belong to the message that holds the last byte of that read. This holds for
//! every client that sends a message with its descriptors in one `sendmsg`, as both known ones do, and lets us take
//! several posted messages with one read.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::OwnedFd;

use super::message::{HEADER_SIZE, Header, MAX_FDS, MAX_MESSAGE};

/// Length of the buffer while no long message is on its way.
const IDLE_LEN: usize = 16 << 10;
/// No more reading while this many messages with descriptors wait.
const MAX_WAITING_FDS: usize = 16;

/// One message, or what is kept of it.
#[derive(Debug)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// Where its payload is, for [`Inbox::bytes`]. Empty when the size in the header cannot be.
    pub payload: Range<usize>,
    /// The descriptors it brought, at most [`MAX_FDS`].
    pub fds: Vec<OwnedFd>,
    /// It brought more, or the kernel could not deliver them all.
    pub fds_lost: bool,
}

/// Descriptors waiting for their message.
#[derive(Debug)]
struct Arrived {
    /// Where the message begins, counted over all bytes ever kept.
    message: u64,
    fds: Vec<OwnedFd>,
    lost: bool,
}

/// The receiving half of a connection. See the module's text.
#[derive(Debug)]
pub struct Inbox {
    buf: Vec<u8>,
    /// First byte not yet taken.
    head: usize,
    /// First byte of the first message that is not complete.
    scan: usize,
    /// End of the received bytes.
    tail: usize,
    /// How many bytes were kept before `buf[0]`.
    base: u64,
    /// Bytes of a too long message that are still to come.
    excess: u64,
    arrived: VecDeque<Arrived>,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            buf: vec![0; IDLE_LEN],
            head: 0,
            scan: 0,
            tail: 0,
            base: 0,
            excess: 0,
            arrived: VecDeque::new(),
        }
    }
}

impl Inbox {
    /// Where the next bytes of the stream go; never empty while [`Self::wants_bytes`].
    pub fn spare(&mut self) -> &mut [u8] {
        if self.head == self.tail {
            self.rebase(self.tail);
            if self.buf.len() > IDLE_LEN {
                self.buf = vec![0; IDLE_LEN];
            }
        }
        let needed = self.first_incomplete_len();
        if self.scan.saturating_add(needed) > self.buf.len() && self.head > 0 {
            self.rebase(self.head);
        }
        let needed = self.scan.saturating_add(needed);
        if needed > self.buf.len() {
            self.buf.resize(needed, 0);
        }
        &mut self.buf[self.tail..]
    }

    /// Whether there is room and sense in reading more before some messages are taken.
    pub fn wants_bytes(&self) -> bool {
        self.scan == self.head || (self.tail < IDLE_LEN && self.arrived.len() < MAX_WAITING_FDS)
    }

    /// Takes note of `len` bytes that were put into [`Self::spare`] and of the descriptors that came with them.
    /// `fds_lost`: there were more than could be received.
    pub fn received(&mut self, len: usize, fds: Vec<OwnedFd>, fds_lost: bool) {
        let end = self.tail.saturating_add(len).min(self.buf.len());
        let last_message = self.cut(end);
        let Some(last_message) = last_message.filter(|_| fds_lost || !fds.is_empty()) else { return };
        let message = self.base + last_message as u64;
        match self.arrived.back_mut() {
            Some(arrived) if arrived.message == message => {
                arrived.lost |= fds_lost || arrived.fds.len() + fds.len() > MAX_FDS;
                let room = MAX_FDS.saturating_sub(arrived.fds.len());
                arrived.fds.extend(fds.into_iter().take(room));
            }
            _ => {
                let lost = fds_lost || fds.len() > MAX_FDS;
                let fds = fds.into_iter().take(MAX_FDS).collect();
                self.arrived.push_back(Arrived { message, fds, lost });
            }
        }
    }

    /// The next complete message. Its bytes stay where they are until [`Self::spare`] is called.
    pub fn pop(&mut self) -> Option<Frame> {
        if self.head == self.scan {
            return None;
        }
        let header = Header::parse(&self.buf[self.head..self.scan])?;
        let start = self.head;
        self.head = start + header.frame_len();
        let position = self.base + start as u64;
        let (mut fds, mut fds_lost) = (Vec::new(), false);
        if self.arrived.front().is_some_and(|arrived| arrived.message == position)
            && let Some(arrived) = self.arrived.pop_front()
        {
            (fds, fds_lost) = (arrived.fds, arrived.lost);
        }
        Some(Frame { header, payload: start + HEADER_SIZE..self.head, fds, fds_lost })
    }

    /// Bytes of a [`Frame`].
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.buf[range]
    }

    /// Length of the message that begins at `scan`, as far as known.
    fn first_incomplete_len(&self) -> usize {
        Header::parse(&self.buf[self.scan..self.tail]).map_or(HEADER_SIZE, |header| header.frame_len())
    }

    /// Finds the messages in the bytes up to `end`, drops the excess of long ones, and tells where the message that
    /// holds the last byte begins, if it is not taken yet. The work is bounded by the number of bytes: a message has at
    /// least 16.
    fn cut(&mut self, mut end: usize) -> Option<usize> {
        let mut last = None;
        if self.excess > 0 {
            end = self.drop_excess(self.tail, end);
            last = (self.head < self.scan).then(|| self.scan - HEADER_SIZE);
        }
        while let Some(header) = Header::parse(&self.buf[self.scan..end]) {
            let frame_end = self.scan + header.frame_len();
            if frame_end > end {
                break;
            }
            last = Some(self.scan);
            self.scan = frame_end;
            self.excess = header.excess_len();
            if self.excess > 0 {
                end = self.drop_excess(frame_end, end);
            }
        }
        self.tail = end;
        if self.scan < end { Some(self.scan) } else { last }
    }

    /// Takes what is excess out of the bytes from `from` to `end`; returns the new end.
    fn drop_excess(&mut self, from: usize, end: usize) -> usize {
        let there = end - from;
        let dropped = usize::try_from(self.excess).unwrap_or(usize::MAX).min(there);
        self.buf.copy_within(from + dropped..end, from);
        self.excess -= dropped as u64;
        end - dropped
    }

    /// Moves the bytes from `start` on to the front.
    fn rebase(&mut self, start: usize) {
        self.buf.copy_within(start..self.tail, 0);
        self.base += start as u64;
        self.head -= start.min(self.head);
        self.scan -= start.min(self.scan);
        self.tail -= start;
    }
}

const _: () = assert!(IDLE_LEN < MAX_MESSAGE && IDLE_LEN > HEADER_SIZE);

#[cfg(test)]
mod tests;
