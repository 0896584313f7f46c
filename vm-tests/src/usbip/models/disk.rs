//! A disk that speaks Bulk-Only Transport (USB Mass Storage Bulk-Only 1.0) and offers UAS as alternate setting 1, as
//! most SuperSpeed disks do. USB/IP has no streams, so UAS is of no use here: who takes setting 1 gets no answer.

use serde_json::{Value, json};

use super::counted::VENDOR;
use crate::usbip::descriptors::{Endpoint, Identity, Image, Setting, Speed};
use crate::usbip::model::{Model, Reply};
use crate::usbip::wire::Setup;

/// Product number.
pub const PRODUCT: u16 = 0x0004;

/// What it holds.
const SIZE_BYTES: usize = 16 << 20;
const BLOCK_BYTES: usize = 512;

const BULK_IN: u8 = 0x81;
const BULK_OUT: u8 = 0x02;

/// Class requests (Bulk-Only §3).
const GET_MAX_LUN: u8 = 0xfe;
const RESET: u8 = 0xff;

/// Pipe usage descriptors (UAS §5.3.3.6): status, data in, data out, command.
const STATUS_PIPE: &[u8] = &[4, 36, 2, 0];
const DATA_IN_PIPE: &[u8] = &[4, 36, 3, 0];
const DATA_OUT_PIPE: &[u8] = &[4, 36, 4, 0];
const COMMAND_PIPE: &[u8] = &[4, 36, 1, 0];

/// SCSI sense: INVALID COMMAND OPERATION CODE, INVALID FIELD IN CDB, LOGICAL BLOCK ADDRESS OUT OF RANGE.
const WRONG_COMMAND: u8 = 0x20;
const WRONG_FIELD: u8 = 0x24;
const WRONG_PLACE: u8 = 0x21;

/// Where a command stands (Bulk-Only Figure 1).
enum Phase {
    /// The next transfer is a command block wrapper.
    Command,
    /// What has not gone to the host yet.
    DataIn { data: Vec<u8>, sent: usize, wanted: usize },
    /// Bytes for this place.
    DataOut { at: usize, wanted: usize, data: Vec<u8> },
    /// The next transfer to the host is the status.
    Status,
}

/// The disk.
pub struct Disk {
    speed: Speed,
    image: Image,
    blocks: Vec<u8>,
    phase: Phase,
    tag: [u8; 4],
    residue: u32,
    /// Additional sense code of the last command that failed.
    sense: u8,
    has_failed: bool,
    reads: u64,
    writes: u64,
    is_uas: bool,
}

impl Disk {
    /// Empty, at high speed or above.
    pub fn new(speed: Speed, serial: &str) -> Self {
        let identity =
            Identity { speed, vendor: VENDOR, product: PRODUCT, class: [0; 3], serial: serial.to_owned() };
        let bulk = [Endpoint::bulk(BULK_IN, speed), Endpoint::bulk(BULK_OUT, speed)];
        let pipes = [(0x81, DATA_IN_PIPE), (0x02, DATA_OUT_PIPE), (0x83, STATUS_PIPE), (0x04, COMMAND_PIPE)];
        let pipes = pipes.map(|(address, usage)| Endpoint::bulk(address, speed).with(usage));
        let settings = [
            Setting { class: [8, 6, 0x50], ..Setting::vendor(0, 0, &bulk) },
            Setting { class: [8, 6, 0x62], ..Setting::vendor(0, 1, &pipes) },
        ];
        Self {
            speed,
            image: Image::new(&identity, &settings),
            blocks: vec![0; SIZE_BYTES],
            phase: Phase::Command,
            tag: [0; 4],
            residue: 0,
            sense: 0,
            has_failed: false,
            reads: 0,
            writes: 0,
            is_uas: false,
        }
    }

    /// Takes a command block wrapper (§5.1).
    fn command(&mut self, wrapper: &[u8]) -> Reply {
        let (Some(b"USBC"), &[_, _, _, _, t0, t1, t2, t3, l0, l1, l2, l3, flags, _, _, ref block @ ..]) =
            (wrapper.get(..4), wrapper)
        else {
            return Reply::Stall;
        };
        self.tag = [t0, t1, t2, t3];
        let wanted = u32::from_le_bytes([l0, l1, l2, l3]);
        let outcome = self.execute(block, flags & 0x80 != 0, wanted as usize);
        self.has_failed = outcome.is_err();
        self.sense = outcome.as_ref().err().copied().unwrap_or(self.sense);
        self.phase = match outcome {
            Ok(phase) => phase,
            // Nothing comes, or what comes is thrown away: the status tells.
            Err(_) if wanted > 0 && flags & 0x80 == 0 => {
                Phase::DataOut { at: SIZE_BYTES, wanted: wanted as usize, data: Vec::new() }
            }
            Err(_) if wanted > 0 => Phase::DataIn { data: Vec::new(), sent: 0, wanted: wanted as usize },
            Err(_) => Phase::Status,
        };
        self.residue = match &self.phase {
            Phase::DataIn { data, .. } => wanted.saturating_sub(data.len() as u32),
            _ => 0,
        };
        Reply::Done(Vec::new())
    }

    /// What a command block asks for, or the sense code of its refusal.
    fn execute(&mut self, block: &[u8], is_in: bool, wanted: usize) -> Result<Phase, u8> {
        let answer = |mut data: Vec<u8>, room: usize| {
            data.truncate(room.min(wanted));
            if wanted == 0 { Phase::Status } else { Phase::DataIn { data, sent: 0, wanted } }
        };
        let byte = |at: usize| block.get(at).copied().unwrap_or(0);
        match byte(0) {
            // TEST UNIT READY, PREVENT ALLOW MEDIUM REMOVAL, START STOP UNIT, SYNCHRONIZE CACHE
            0x00 | 0x1e | 0x1b | 0x35 => Ok(Phase::Status),
            0x03 => {
                let mut sense = vec![0x70, 0, if self.sense == 0 { 0 } else { 5 }, 0, 0, 0, 0, 10];
                sense.resize(18, 0);
                sense[12] = std::mem::take(&mut self.sense);
                Ok(answer(sense, byte(4).into()))
            }
            // INQUIRY: a disk, no vital product data.
            0x12 if byte(1) & 1 == 0 => {
                let mut data = vec![0, 0, 5, 2, 31, 0, 0, 0];
                data.extend_from_slice(b"vm-tests");
                data.extend_from_slice(b"scripted disk   1.00");
                Ok(answer(data, u16::from_be_bytes([byte(3), byte(4)]).into()))
            }
            // MODE SENSE(6): no pages, not protected.
            0x1a => Ok(answer(vec![3, 0, 0, 0], byte(4).into())),
            // READ CAPACITY(10)
            0x25 => {
                let last = (SIZE_BYTES / BLOCK_BYTES - 1) as u32;
                let data = [last.to_be_bytes(), (BLOCK_BYTES as u32).to_be_bytes()].concat();
                Ok(answer(data, 8))
            }
            code @ (0x28 | 0x2a) => {
                let start = u32::from_be_bytes([byte(2), byte(3), byte(4), byte(5)]) as usize * BLOCK_BYTES;
                let length = usize::from(u16::from_be_bytes([byte(7), byte(8)])) * BLOCK_BYTES;
                let place = self.blocks.get(start..start + length).ok_or(WRONG_PLACE)?;
                match (code, is_in) {
                    (0x28, true) => {
                        self.reads += 1;
                        Ok(answer(place.to_vec(), length))
                    }
                    (0x2a, false) if length == wanted => {
                        self.writes += 1;
                        Ok(Phase::DataOut { at: start, wanted, data: Vec::with_capacity(wanted) })
                    }
                    _ => Err(WRONG_FIELD),
                }
            }
            0x12 => Err(WRONG_FIELD),
            _ => Err(WRONG_COMMAND),
        }
    }
}

impl Model for Disk {
    fn speed(&self) -> Speed {
        self.speed
    }

    fn image(&self) -> &Image {
        &self.image
    }

    fn control(&mut self, setup: &Setup, _data: &[u8]) -> Reply {
        match (setup.request_type, setup.request) {
            (0xa1, GET_MAX_LUN) => Reply::Done(vec![0]),
            (0x21, RESET) => {
                self.phase = Phase::Command;
                Reply::Done(Vec::new())
            }
            _ => Reply::Standard,
        }
    }

    fn read(&mut self, endpoint: u8, room: usize) -> Reply {
        if self.is_uas || endpoint != BULK_IN {
            return Reply::Nak;
        }
        match &mut self.phase {
            Phase::Command | Phase::DataOut { .. } => Reply::Nak,
            Phase::DataIn { data, sent, wanted } => {
                let part = data[*sent..data.len().min(*sent + room)].to_vec();
                *sent += part.len();
                // The phase ends with all that was asked for, or with a short packet.
                if part.len() < room || *sent == *wanted {
                    self.phase = Phase::Status;
                }
                Reply::Done(part)
            }
            Phase::Status => {
                let mut status = b"USBS".to_vec();
                status.extend(self.tag);
                status.extend(self.residue.to_le_bytes());
                status.push(self.has_failed.into());
                self.phase = Phase::Command;
                Reply::Done(status)
            }
        }
    }

    fn write(&mut self, endpoint: u8, data: &[u8]) -> Reply {
        if self.is_uas || endpoint != BULK_OUT {
            return Reply::Nak;
        }
        match &mut self.phase {
            Phase::Command => return self.command(data),
            Phase::DataOut { at, wanted, data: so_far } => {
                so_far.extend_from_slice(data);
                if so_far.len() >= *wanted {
                    if let Some(place) = self.blocks.get_mut(*at..*at + so_far.len()) {
                        place.copy_from_slice(so_far);
                    }
                    self.phase = Phase::Status;
                }
            }
            Phase::DataIn { .. } | Phase::Status => return Reply::Nak,
        }
        Reply::Done(Vec::new())
    }

    fn setting_chosen(&mut self, _interface: u8, alternate: u8) {
        self.is_uas = alternate == 1;
        self.phase = Phase::Command;
    }

    fn statistics(&self) -> Value {
        json!({ "reads": self.reads, "writes": self.writes, "is_uas": self.is_uas })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrapper(length: u32, is_in: bool, block: &[u8]) -> Vec<u8> {
        let mut bytes = b"USBC\x01\x02\x03\x04".to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend([if is_in { 0x80 } else { 0 }, 0, block.len() as u8]);
        bytes.extend(block);
        bytes.resize(31, 0);
        bytes
    }

    fn status_of(disk: &mut Disk) -> u8 {
        let Reply::Done(status) = disk.read(BULK_IN, 13) else { panic!("no status") };
        assert_eq!(status[..8], *b"USBS\x01\x02\x03\x04");
        status[12]
    }

    #[test]
    fn what_is_written_is_read() {
        let mut disk = Disk::new(Speed::Super, "1");
        let data: Vec<u8> = (0..1024).map(|n| (n / 3) as u8).collect();
        disk.write(BULK_OUT, &wrapper(1024, false, &[0x2a, 0, 0, 0, 0, 7, 0, 0, 2, 0]));
        disk.write(BULK_OUT, &data[..512]);
        disk.write(BULK_OUT, &data[512..]);
        assert_eq!(status_of(&mut disk), 0);
        disk.write(BULK_OUT, &wrapper(1024, true, &[0x28, 0, 0, 0, 0, 7, 0, 0, 2, 0]));
        assert_eq!(disk.read(BULK_IN, 1024), Reply::Done(data));
        assert_eq!(status_of(&mut disk), 0);
    }

    #[test]
    fn a_place_behind_the_end_is_refused_and_the_sense_tells() {
        let mut disk = Disk::new(Speed::Super, "1");
        disk.write(BULK_OUT, &wrapper(512, true, &[0x28, 0, 0xff, 0, 0, 0, 0, 0, 1, 0]));
        assert_eq!(disk.read(BULK_IN, 512), Reply::Done(Vec::new()));
        assert_eq!(status_of(&mut disk), 1);
        disk.write(BULK_OUT, &wrapper(18, true, &[0x03, 0, 0, 0, 18, 0]));
        let Reply::Done(sense) = disk.read(BULK_IN, 18) else { panic!("no sense") };
        assert_eq!((sense[2], sense[12]), (5, WRONG_PLACE));
    }

    #[test]
    fn an_answer_shorter_than_asked_for_ends_with_its_residue() {
        let mut disk = Disk::new(Speed::Super, "1");
        disk.write(BULK_OUT, &wrapper(192, true, &[0x1a, 0, 0x3f, 0, 192, 0]));
        assert_eq!(disk.read(BULK_IN, 192), Reply::Done(vec![3, 0, 0, 0]));
        let Reply::Done(status) = disk.read(BULK_IN, 13) else { panic!("no status") };
        assert_eq!(status[8..], [188, 0, 0, 0, 0]);
    }
}
