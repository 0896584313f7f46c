//! A phone or camera as a file manager uses it (PIMA 15740 over the USB still image class, MTP 1.1).

use anyhow::{Context, Result, bail, ensure};

use super::Pipes;

const BULK_IN: u8 = 0x81;
const BULK_OUT: u8 = 0x02;

/// Container types (Still Image §7.1.1).
const COMMAND: u16 = 1;
const DATA: u16 = 2;
const RESPONSE: u16 = 3;

const OK: u16 = 0x2001;

/// Operations (MTP 1.1 annex D).
mod operation {
    pub(super) const GET_DEVICE_INFO: u16 = 0x1001;
    pub(super) const OPEN_SESSION: u16 = 0x1002;
    pub(super) const CLOSE_SESSION: u16 = 0x1003;
    pub(super) const GET_STORAGE_IDS: u16 = 0x1004;
    pub(super) const GET_OBJECT_HANDLES: u16 = 0x1007;
    pub(super) const GET_OBJECT_INFO: u16 = 0x1008;
    pub(super) const GET_OBJECT: u16 = 0x1009;
}

const HEADER_BYTES: usize = 12;
/// As much as an application asks for at once.
const READ_BYTES: usize = 64 * 1024;
const OBJECT_BYTES_MAX: usize = 64 << 20;

/// A phone in a session.
pub struct Phone {
    pipes: Pipes,
    transaction: u32,
    /// Manufacturer and model, as it says itself.
    pub names: [String; 2],
}

/// A file there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its handle.
    pub handle: u32,
    /// Its name.
    pub name: String,
    /// Its length as announced.
    pub size: u32,
}

impl Phone {
    /// Opens the phone with this `vendor:product` and a session.
    pub fn open(id: &str) -> Result<Self> {
        let pipes = Pipes::open(id, BULK_IN, BULK_OUT)?;
        let mut phone = Self { pipes, transaction: 0, names: Default::default() };
        phone.ask(operation::OPEN_SESSION, &[1])?;
        let info = phone.fetch(operation::GET_DEVICE_INFO, &[])?;
        phone.names = names_of(&info).context("the device info is cut short")?;
        Ok(phone)
    }

    /// The files in the first storage's root.
    pub fn list(&mut self) -> Result<Vec<Object>> {
        let storages = words(&self.fetch(operation::GET_STORAGE_IDS, &[])?)?;
        let storage = *storages.first().context("no storage")?;
        let handles = words(&self.fetch(operation::GET_OBJECT_HANDLES, &[storage, 0, u32::MAX])?)?;
        handles.into_iter().map(|handle| self.object(handle)).collect()
    }

    /// The content of a file.
    pub fn get(&mut self, object: &Object) -> Result<Vec<u8>> {
        let content = self.fetch(operation::GET_OBJECT, &[object.handle])?;
        ensure!(content.len() == object.size as usize, "{} bytes of {object:?}", content.len());
        Ok(content)
    }

    /// Ends the session.
    pub fn close(mut self) -> Result<()> {
        self.ask(operation::CLOSE_SESSION, &[])
    }

    fn object(&mut self, handle: u32) -> Result<Object> {
        let info = self.fetch(operation::GET_OBJECT_INFO, &[handle])?;
        let size = info.get(8..12).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        let name = info.get(52..).and_then(|rest| string(rest)).map(|(name, _)| name);
        let (Some(size), Some(name)) = (size, name) else { bail!("object info of {} bytes", info.len()) };
        Ok(Object { handle, name, size })
    }

    fn ask(&mut self, operation: u16, parameters: &[u32]) -> Result<()> {
        self.command(operation, parameters)?;
        let response = self.container().with_context(|| format!("operation {operation:#x}"))?;
        self.check(operation, &response)
    }

    fn fetch(&mut self, operation: u16, parameters: &[u32]) -> Result<Vec<u8>> {
        self.command(operation, parameters)?;
        let data = self.container().with_context(|| format!("data of operation {operation:#x}"))?;
        ensure!(data.kind == DATA && data.code == operation, "no data: {:x?}", data.head());
        let response = self.container().with_context(|| format!("end of operation {operation:#x}"))?;
        self.check(operation, &response)?;
        Ok(data.payload)
    }

    fn check(&self, operation: u16, response: &Container) -> Result<()> {
        let is_ok = response.kind == RESPONSE && response.code == OK;
        ensure!(is_ok && response.transaction == self.transaction, "{operation:#x}: {:x?}", response.head());
        Ok(())
    }

    fn command(&mut self, operation: u16, parameters: &[u32]) -> Result<()> {
        self.transaction += 1;
        let length = (HEADER_BYTES + 4 * parameters.len()) as u32;
        let mut message = length.to_le_bytes().to_vec();
        message.extend(COMMAND.to_le_bytes());
        message.extend(operation.to_le_bytes());
        message.extend(self.transaction.to_le_bytes());
        message.extend(parameters.iter().flat_map(|parameter| parameter.to_le_bytes()));
        self.pipes.write(&message)
    }

    /// One container, however many transfers it takes.
    fn container(&mut self) -> Result<Container> {
        let mut bytes = self.pipes.read(READ_BYTES)?;
        ensure!(bytes.len() >= HEADER_BYTES, "a container of {} bytes", bytes.len());
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (length, kind, code, transaction) = (word(0) as usize, half(4), half(6), word(8));
        ensure!(length <= OBJECT_BYTES_MAX, "a container of {length} bytes is announced");
        while bytes.len() < length {
            let more = self.pipes.read(READ_BYTES)?;
            ensure!(!more.is_empty(), "the container ends after {} of {length} bytes", bytes.len());
            bytes.extend(more);
        }
        ensure!(bytes.len() == length, "{} bytes in a container of {length}", bytes.len());
        Ok(Container { kind, code, transaction, payload: bytes.split_off(HEADER_BYTES) })
    }
}

struct Container {
    kind: u16,
    code: u16,
    transaction: u32,
    payload: Vec<u8>,
}

impl Container {
    fn head(&self) -> (u16, u16, u32) {
        (self.kind, self.code, self.transaction)
    }
}

/// An array of 32-bit numbers: their count first.
fn words(bytes: &[u8]) -> Result<Vec<u32>> {
    let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let (count, rest) = words.split_first().context("an empty array")?;
    ensure!(*count as usize == rest.len(), "{count} numbers are announced, {} came", rest.len());
    Ok(rest.to_vec())
}

/// A string, its length in UTF-16 units with the closing 0 first, and what follows it.
fn string(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (&count, rest) = bytes.split_first()?;
    let (units, rest) = rest.split_at_checked(2 * usize::from(count))?;
    let units: Vec<u16> = units.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit)).collect();
    Some((String::from_utf16_lossy(units.strip_suffix(&[0]).unwrap_or(&units)), rest))
}

/// Manufacturer and model of a device info dataset (MTP 1.1 §5.1.1).
fn names_of(info: &[u8]) -> Option<[String; 2]> {
    // Standard version, vendor extension and its version; then a string, a mode, and five arrays of 16-bit numbers.
    let (_, mut rest) = string(info.get(8..)?)?;
    rest = rest.get(2..)?;
    for _ in 0..5 {
        let (&count, after) = rest.split_first_chunk::<4>()?;
        rest = after.get(2 * u32::from_le_bytes(count) as usize..)?;
    }
    let (manufacturer, rest) = string(rest)?;
    Some([manufacturer, string(rest)?.0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_behind_the_arrays_of_a_device_info() {
        let mut info = vec![100, 0, 6, 0, 0, 0, 0, 0];
        info.extend([2, b'm', 0, 0, 0, 0, 0]);
        info.extend([1, 0, 0, 0, 0x01, 0x10, 0, 0, 0, 0, 0, 0, 0, 0]);
        info.extend([0; 8]);
        info.extend([3, b'A', 0, b'B', 0, 0, 0, 2, b'C', 0, 0, 0]);
        assert_eq!(names_of(&info), Some(["AB".to_owned(), "C".to_owned()]));
        assert_eq!(names_of(&info[..info.len() - 3]), None);
    }

    #[test]
    fn an_array_shorter_than_it_says_is_refused() {
        assert_eq!(words(&[1, 0, 0, 0, 9, 0, 0, 0]).unwrap(), [9]);
        assert!(words(&[2, 0, 0, 0, 9, 0, 0, 0]).is_err());
    }
}
