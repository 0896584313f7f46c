//! `usb-client echo /dev/ttyACM0`, `usb-client card --id 08e6:4433` and others: a program's end of a device, run in a
//! guest. Prints one JSON object with what was moved; fails when something is not as it should be.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vm_tests::clients::card_reader::CardReader;
use vm_tests::clients::phone::Phone;
use vm_tests::clients::{numbers, security_key};
use vm_tests::devices::hex;

/// A program's end of a device.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Numbered bytes to a serial line and back.
    Echo {
        /// The line, raw.
        line: PathBuf,
        /// How many.
        #[arg(long, default_value_t = 1 << 20)]
        bytes: u64,
    },
    /// Numbered bytes to a TCP peer.
    Send {
        /// Address and port.
        address: String,
        /// Wait for the peer there instead of connecting.
        #[arg(long)]
        listen: bool,
        /// How many.
        #[arg(long)]
        bytes: u64,
    },
    /// Numbered bytes from a TCP peer.
    Receive {
        /// Address and port.
        address: String,
        /// Wait for the peer there instead of connecting.
        #[arg(long)]
        listen: bool,
    },
    /// Sample pairs for the loudspeaker of the harness, raw, to standard output.
    Samples {
        /// How many.
        #[arg(long)]
        count: u32,
    },
    /// Pings to a security key.
    Key {
        /// `/dev/hidrawN`.
        node: PathBuf,
    },
    /// Power for a smart card, and commands that it answers with the same bytes in reverse order.
    Card {
        /// The reader, vendor:product in hexadecimal.
        #[arg(long)]
        id: String,
    },
    /// The files of a phone, each with its checksum.
    Phone {
        /// The phone, vendor:product in hexadecimal.
        #[arg(long)]
        id: String,
    },
}

fn main() -> Result<()> {
    let report = match Arguments::parse().action {
        Action::Echo { line, bytes } => json!(numbers::echo(&line, bytes)?),
        Action::Send { address, listen, bytes } => {
            json!(numbers::send(numbers::connect(&address, listen)?, bytes)?)
        }
        Action::Receive { address, listen } => json!(numbers::receive(numbers::connect(&address, listen)?)?),
        Action::Samples { count } => return numbers::samples(std::io::stdout().lock(), count),
        Action::Key { node } => json!({ "echoed": security_key::ping(&node)? }),
        Action::Card { id } => use_card(&id)?,
        Action::Phone { id } => list_phone(&id)?,
    };
    println!("{report}");
    Ok(())
}

/// Lengths around those at which transfers change: one packet of 64 bytes, with the message's ten in front.
const COMMAND_BYTES: [usize; 6] = [0, 1, 49, 50, 128, 255];

fn use_card(id: &str) -> Result<Value> {
    let mut reader = CardReader::open(id)?;
    let powered = reader.power_on()?;
    let mut moved = 0;
    for length in COMMAND_BYTES {
        let data: Vec<u8> = (0..length).map(|n| (n * 7 + length) as u8).collect();
        let mut command = vec![0x80, 0x10, 0, 0, u8::try_from(length)?];
        command.extend(&data);
        let answer = reader.transmit(&command).with_context(|| format!("command of {length} bytes"))?;
        let expected: Vec<u8> = data.iter().rev().copied().chain([0x90, 0x00]).collect();
        ensure!(answer == expected, "a command of {length} bytes is answered with {answer:x?}");
        moved += command.len() + answer.len();
    }
    let off = reader.power_off()?;
    let answer = hex(&powered.answer);
    Ok(json!({ "answer": answer, "status": [powered.before, powered.after, off], "moved": moved }))
}

fn list_phone(id: &str) -> Result<Value> {
    let mut phone = Phone::open(id)?;
    let mut files = serde_json::Map::new();
    for object in phone.list()? {
        let content = phone.get(&object)?;
        files.insert(object.name, json!(hex(&Sha256::digest(&content))));
    }
    let [manufacturer, model] = phone.names.clone();
    phone.close()?;
    Ok(json!({ "manufacturer": manufacturer, "model": model, "files": files }))
}
