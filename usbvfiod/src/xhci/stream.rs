//! Streams of a bulk endpoint: the primary stream array, linear, without secondary arrays (xHCI 1.2 §4.12, §6.2.4).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::GuestMem;
use super::context::EndpointState;
use super::controller::{Controller, Io};
use super::ring::{Cursor, read_object};
use super::slot::{Endpoint, StreamArray, TransferRing};
use super::trb::{CompletionCode, Trb};

/// Stream Context Type of a transfer ring in a linear primary array (Table 6-12).
const PRIMARY_RING: u64 = 1;

/// Stream Context (§6.2.4.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct StreamContext {
    dequeue: U64,
    stopped_accumulator: U32,
    reserved: U32,
}

impl StreamArray {
    fn entry(self, stream: u16) -> u64 {
        self.at.wrapping_add(u64::from(stream) * 16)
    }

    /// Whether the guest may name this stream; 0 is reserved.
    pub(super) fn contains(self, stream: u16) -> bool {
        (1..self.count).contains(&stream)
    }
}

impl Controller {
    /// Makes sure the ring of a stream is known. False for a stream that is none: a doorbell for an id out of range is
    /// ignored, one for a context of another type is told and stops the endpoint.
    pub(super) fn open_stream<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
        stream: u16,
    ) -> bool {
        let Some(array) = endpoint.streams.filter(|array| array.contains(stream)) else { return false };
        let place = &mut endpoint.rings[usize::from(stream)];
        if place.is_some() {
            return true;
        }
        let context: Result<StreamContext, _> = read_object(io.mem, array.entry(stream));
        if let Ok(context) = context
            && context.dequeue.get() >> 1 & 7 == PRIMARY_RING
        {
            *place = Some(TransferRing::new(Cursor::from_field(context.dequeue.get())));
            return true;
        }
        endpoint.state = EndpointState::Error;
        self.abandon(endpoint, slot, io.effects);
        self.write_dequeue(io, slot, endpoint);
        let code = CompletionCode::InvalidStreamType;
        self.post(io, 0, Trb::transfer_event(0, 0, code, slot, endpoint.dci.get(), false), false);
        false
    }
}

impl Endpoint {
    /// Writes the dequeue pointers of all streams in use to their contexts.
    pub(super) fn write_streams<M: GuestMem>(&self, mem: &M) {
        let Some(array) = self.streams else { return };
        for (stream, ring) in (0..array.count).zip(&self.rings) {
            if let Some(ring) = ring {
                let moved = ring.resume.map_or(0, |resume| resume.moved);
                write_stream(mem, array.entry(stream), ring.dequeue(), moved);
            }
        }
    }

    /// Set TR Dequeue Pointer for a stream (§4.6.10).
    pub(super) fn set_stream<M: GuestMem>(
        &mut self,
        mem: &M,
        stream: u16,
        cursor: Cursor,
    ) -> Result<(), CompletionCode> {
        let Some(array) = self.streams else { return Err(CompletionCode::Trb) };
        if !array.contains(stream) {
            return Err(CompletionCode::InvalidStreamId);
        }
        self.rings[usize::from(stream)] = Some(TransferRing::new(cursor));
        write_stream(mem, array.entry(stream), cursor, 0);
        Ok(())
    }
}

/// Stopped EDTLA (SEC = 1) is what was moved of a TD that was stopped.
fn write_stream<M: GuestMem>(mem: &M, at: u64, cursor: Cursor, moved: u32) {
    let context = StreamContext {
        dequeue: (cursor.field() | PRIMARY_RING << 1).into(),
        stopped_accumulator: (moved & 0xff_ffff).into(),
        reserved: 0.into(),
    };
    if let Err(fault) = mem.write(at, context.as_bytes()) {
        common::limited!(debug, %fault, "stream context not written");
    }
}
