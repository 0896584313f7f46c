//! Replies on their way to the client. Pure.
//!
//! One buffer, reused, with the length of each reply beside it: each is sent on its own, because Cloud Hypervisor and
//! QEMU read a header, or a header with its fixed payload, with one `recvmsg` and do not come back for the rest.

use std::collections::VecDeque;
use std::ops::Range;

use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::message::Header;

/// No more messages are answered while this many bytes wait. One reply may go beyond it.
const FULL: usize = 64 << 10;
/// The buffer gives its memory back when it is empty and larger than this.
const KEEP: usize = 16 << 10;

/// The sending half of a connection. See the module's text.
#[derive(Debug, Default)]
pub struct Outbox {
    buf: Vec<u8>,
    /// What of `buf` is sent.
    sent: usize,
    /// Ends of the replies in `buf` that are not wholly sent.
    ends: VecDeque<usize>,
}

impl Outbox {
    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether the client should first take some replies.
    pub fn is_full(&self) -> bool {
        self.buf.len() - self.sent >= FULL
    }

    /// What is to be sent next: one reply, or the rest of one. Empty when there is nothing.
    pub fn next(&self) -> &[u8] {
        let end = self.ends.front().copied().unwrap_or(self.sent);
        &self.buf[self.sent..end]
    }

    /// Takes note that the first `len` bytes of [`Self::next`] are sent.
    pub fn sent(&mut self, len: usize) {
        let Some(&end) = self.ends.front() else { return };
        self.sent = self.sent.saturating_add(len).min(end);
        if self.sent == end {
            self.ends.pop_front();
        }
        if self.ends.is_empty() {
            self.buf.clear();
            self.buf.shrink_to(KEEP);
            self.sent = 0;
        } else if self.sent >= FULL {
            self.buf.drain(..self.sent);
            self.ends.iter_mut().for_each(|end| *end -= self.sent);
            self.sent = 0;
        }
    }

    /// Queues a reply that says success, if the client wants one.
    pub(super) fn reply(&mut self, header: &Header, payload: &[&[u8]]) {
        if header.is_no_reply() {
            return;
        }
        let len = payload.iter().map(|part| part.len()).sum();
        self.buf.extend_from_slice(header.reply(len).as_bytes());
        payload.iter().for_each(|part| self.buf.extend_from_slice(part));
        self.ends.push_back(self.buf.len());
    }

    /// Queues a reply whose payload ends in `count` bytes of ones, and tells where they are, if the client wants one.
    pub(super) fn reply_with_ones(
        &mut self,
        header: &Header,
        payload: &[u8],
        count: usize,
    ) -> Option<Range<usize>> {
        if header.is_no_reply() {
            return None;
        }
        self.buf.extend_from_slice(header.reply(payload.len() + count).as_bytes());
        self.buf.extend_from_slice(payload);
        let start = self.buf.len();
        self.buf.resize(start + count, 0xff);
        self.ends.push_back(self.buf.len());
        Some(start..start + count)
    }

    /// Queues an error reply, if the client wants one.
    pub(super) fn error(&mut self, header: &Header, errno: Errno) {
        if header.is_no_reply() {
            return;
        }
        self.buf.extend_from_slice(header.error_reply(errno).as_bytes());
        self.ends.push_back(self.buf.len());
    }

    /// The bytes that [`Self::reply_with_ones`] told of.
    pub(super) fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.buf[range]
    }
}
