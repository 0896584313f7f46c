//! The USB/IP messages between `vhci_hcd` and a device (kernel `Documentation/usb/usbip_protocol.rst`, from
//! USBIP_CMD_SUBMIT on). All numbers on the wire are big-endian, except the setup packet, which is a USB one.
//!
//! The attach dialogue of the protocol is missing on purpose: `vhci_hcd` takes a connected socket.

use std::io::{self, Read};

/// Bytes of each message before its data.
pub const HEADER_BYTES: usize = 48;

/// The largest transfer taken from the kernel; usbfs itself allows more than any test needs.
pub const TRANSFER_BYTES_MAX: u32 = 64 << 20;

/// The largest number of packets of an isochronous transfer (`usbip_common.h USBIP_MAX_ISO_PACKETS`).
pub const ISO_PACKETS_MAX: u32 = 1024;

const CMD_SUBMIT: u32 = 1;
const CMD_UNLINK: u32 = 2;
const RET_SUBMIT: u32 = 3;
const RET_UNLINK: u32 = 4;

const URB_SHORT_NOT_OK: u32 = 1;

/// A setup packet (USB 2.0 §9.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// bmRequestType.
    pub request_type: u8,
    /// bRequest.
    pub request: u8,
    /// wValue.
    pub value: u16,
    /// wIndex.
    pub index: u16,
    /// wLength.
    pub length: u16,
}

impl Setup {
    /// From its eight bytes.
    pub const fn parse(bytes: [u8; 8]) -> Self {
        Self {
            request_type: bytes[0],
            request: bytes[1],
            value: u16::from_le_bytes([bytes[2], bytes[3]]),
            index: u16::from_le_bytes([bytes[4], bytes[5]]),
            length: u16::from_le_bytes([bytes[6], bytes[7]]),
        }
    }

    /// Its eight bytes.
    pub const fn encode(self) -> [u8; 8] {
        let [value, index, length] =
            [self.value.to_le_bytes(), self.index.to_le_bytes(), self.length.to_le_bytes()];
        [self.request_type, self.request, value[0], value[1], index[0], index[1], length[0], length[1]]
    }
}

/// One packet of an isochronous transfer, in both directions of the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IsoPacket {
    /// Where it lies in the buffer of the host's driver.
    pub offset: u32,
    /// Its room.
    pub length: u32,
    /// What was moved.
    pub actual: u32,
    /// 0 or a negative errno.
    pub status: i32,
}

/// A transfer that the host asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Submit {
    /// Its number; the answer carries it.
    pub seqnum: u32,
    /// From the device to the host.
    pub is_in: bool,
    /// Endpoint number without direction, 0..=15.
    pub endpoint: u8,
    /// A transfer from the device that ends early is an error to the host's driver (URB_SHORT_NOT_OK).
    pub is_short_an_error: bool,
    /// Bytes asked for or sent.
    pub length: u32,
    /// Frame at which an isochronous transfer starts.
    pub start_frame: i32,
    /// Microframes (frames below high speed) between two packets; 0 except for periodic endpoints.
    pub interval: u32,
    /// Only of meaning for endpoint 0.
    pub setup: Setup,
    /// Payload of a transfer to the device.
    pub data: Vec<u8>,
    /// Not empty for isochronous transfers only.
    pub packets: Vec<IsoPacket>,
}

impl Submit {
    /// The endpoint address with its direction bit; endpoint 0 is 0 in both directions.
    pub const fn address(&self) -> u8 {
        if self.is_in && self.endpoint != 0 { self.endpoint | 0x80 } else { self.endpoint }
    }
}

/// What the kernel sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// USBIP_CMD_SUBMIT.
    Submit(Submit),
    /// USBIP_CMD_UNLINK.
    Unlink {
        /// The number of this command.
        seqnum: u32,
        /// The number of the transfer that shall end.
        victim: u32,
    },
}

/// Reads one command; `None` at the end of the connection.
pub fn read_command(from: &mut impl Read) -> io::Result<Option<Command>> {
    let mut header = [0; HEADER_BYTES];
    match from.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let word = |index: usize| u32_at(&header, index);
    match word(0) {
        CMD_SUBMIT => read_submit(&header, from).map(|submit| Some(Command::Submit(submit))),
        CMD_UNLINK => Ok(Some(Command::Unlink { seqnum: word(1), victim: word(5) })),
        other => Err(invalid(format!("command {other}"))),
    }
}

fn read_submit(header: &[u8; HEADER_BYTES], from: &mut impl Read) -> io::Result<Submit> {
    let word = |index: usize| u32_at(header, index);
    let endpoint = u8::try_from(word(4)).ok().filter(|&number| number < 16);
    let endpoint = endpoint.ok_or_else(|| invalid(format!("endpoint {}", word(4))))?;
    let length = word(6);
    if length > TRANSFER_BYTES_MAX {
        return Err(invalid(format!("transfer of {length} bytes")));
    }
    // The document says -1 for everything that is not isochronous; vhci_hcd sends 0.
    let packet_count = if word(8) == u32::MAX { 0 } else { word(8) };
    if packet_count > ISO_PACKETS_MAX {
        return Err(invalid(format!("{packet_count} isochronous packets")));
    }
    let is_in = word(3) == 1;
    let mut data = vec![0; if is_in { 0 } else { length as usize }];
    from.read_exact(&mut data)?;
    let mut packets = Vec::with_capacity(packet_count as usize);
    for _ in 0..packet_count {
        let mut bytes = [0; 16];
        from.read_exact(&mut bytes)?;
        packets.push(IsoPacket {
            offset: u32_at(&bytes, 0),
            length: u32_at(&bytes, 1),
            actual: 0,
            status: 0,
        });
    }
    let setup = [40, 41, 42, 43, 44, 45, 46, 47].map(|at: usize| header[at]);
    Ok(Submit {
        seqnum: word(1),
        is_in,
        endpoint,
        is_short_an_error: word(5) & URB_SHORT_NOT_OK != 0,
        length,
        start_frame: word(7).cast_signed(),
        interval: word(9),
        setup: Setup::parse(setup),
        data,
        packets,
    })
}

/// How a transfer ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// 0 or a negative errno.
    pub status: i32,
    /// Bytes moved.
    pub actual: u32,
    /// Bytes for the host: those of all isochronous packets without gaps.
    pub data: Vec<u8>,
    /// The packets of an isochronous transfer, as many as were asked for.
    pub packets: Vec<IsoPacket>,
}

/// USBIP_RET_SUBMIT with its data.
pub fn encode_completion(submit: &Submit, completion: &Completion) -> Vec<u8> {
    let errors = completion.packets.iter().filter(|packet| packet.status != 0).count() as u32;
    let packet_count = completion.packets.len() as u32;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + completion.data.len() + 16 * completion.packets.len());
    put(&mut bytes, &[RET_SUBMIT, submit.seqnum, 0, 0, 0]);
    let start_frame = submit.start_frame.cast_unsigned();
    put(
        &mut bytes,
        &[completion.status.cast_unsigned(), completion.actual, start_frame, packet_count, errors, 0, 0],
    );
    bytes.extend_from_slice(&completion.data);
    for packet in &completion.packets {
        put(&mut bytes, &[packet.offset, packet.length, packet.actual, packet.status.cast_unsigned()]);
    }
    bytes
}

/// USBIP_RET_UNLINK: `status` is 0 when the transfer had ended before, else -ECONNRESET.
pub fn encode_unlinked(seqnum: u32, status: i32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    put(&mut bytes, &[RET_UNLINK, seqnum, 0, 0, 0, status.cast_unsigned(), 0, 0, 0, 0, 0, 0]);
    bytes
}

fn put(bytes: &mut Vec<u8>, words: &[u32]) {
    for word in words {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
}

fn u32_at(bytes: &[u8], index: usize) -> u32 {
    let at = 4 * index;
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(words: [u32; 10], setup: [u8; 8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(&mut bytes, &words);
        bytes.extend_from_slice(&setup);
        bytes
    }

    #[test]
    fn control_read_has_its_setup_and_no_data() {
        let bytes = header([1, 7, 0x10001, 1, 0, 0x200, 64, 0, 0, 0], [0x80, 6, 0, 1, 0, 0, 64, 0]);
        let Some(Command::Submit(submit)) = read_command(&mut bytes.as_slice()).unwrap() else { panic!() };
        assert_eq!(
            submit.setup,
            Setup { request_type: 0x80, request: 6, value: 0x100, index: 0, length: 64 }
        );
        assert_eq!((submit.seqnum, submit.is_in, submit.length, submit.data.len()), (7, true, 64, 0));
    }

    #[test]
    fn isochronous_out_carries_data_and_then_packets() {
        let mut bytes = header([1, 8, 0, 0, 2, 0, 3, 0, 2, 8], [0; 8]);
        bytes.extend_from_slice(&[1, 2, 3]);
        put(&mut bytes, &[0, 1, 0, 0, 1, 2, 0, 0]);
        let Some(Command::Submit(submit)) = read_command(&mut bytes.as_slice()).unwrap() else { panic!() };
        assert_eq!(submit.data, [1, 2, 3]);
        assert_eq!(submit.packets[1], IsoPacket { offset: 1, length: 2, actual: 0, status: 0 });
        assert_eq!((submit.address(), submit.interval), (2, 8));
    }

    #[test]
    fn unlink_names_its_victim() {
        let bytes = header([2, 9, 0, 0, 0, 7, 0, 0, 0, 0], [0; 8]);
        assert_eq!(
            read_command(&mut bytes.as_slice()).unwrap(),
            Some(Command::Unlink { seqnum: 9, victim: 7 })
        );
    }

    #[test]
    fn packet_count_of_minus_one_is_no_isochronous_transfer() {
        let bytes = header([1, 1, 0, 1, 1, 0, 512, 0, u32::MAX, 0], [0; 8]);
        let Some(Command::Submit(submit)) = read_command(&mut bytes.as_slice()).unwrap() else { panic!() };
        assert!(submit.packets.is_empty());
    }

    #[test]
    fn lengths_beyond_the_bounds_are_refused_before_anything_is_allocated() {
        let long = header([1, 1, 0, 0, 1, 0, TRANSFER_BYTES_MAX + 1, 0, 0, 0], [0; 8]);
        let many = header([1, 1, 0, 1, 1, 0, 0, 0, ISO_PACKETS_MAX + 1, 0], [0; 8]);
        let endpoint = header([1, 1, 0, 1, 16, 0, 0, 0, 0, 0], [0; 8]);
        for bytes in [long, many, endpoint] {
            assert_eq!(read_command(&mut bytes.as_slice()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn end_of_connection_is_no_error() {
        assert_eq!(read_command(&mut [].as_slice()).unwrap(), None);
    }

    #[test]
    fn completion_counts_the_failed_packets() {
        let packets = vec![
            IsoPacket { offset: 0, length: 4, actual: 4, status: 0 },
            IsoPacket { offset: 4, length: 4, actual: 0, status: -18 },
        ];
        let completion = Completion { status: 0, actual: 4, data: vec![9; 4], packets };
        let bytes = encode_completion(&Submit { seqnum: 5, ..Submit::default() }, &completion);
        assert_eq!(bytes.len(), HEADER_BYTES + 4 + 32);
        assert_eq!(
            [u32_at(&bytes, 0), u32_at(&bytes, 1), u32_at(&bytes, 8), u32_at(&bytes, 9)],
            [3, 5, 2, 1]
        );
    }
}
