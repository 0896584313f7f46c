//! `usb-stream --id 1209:0002 isochronous-in --seconds 2`: moves numbered data through usbfs, checks it, and prints one
//! JSON object with what it saw. Also single requests whose time matters.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use serde_json::json;
use vm_tests::neighbours;
use vm_tests::stream::{self, Shape};

/// Numbered data through usbfs.
#[derive(Parser)]
struct Arguments {
    /// The device, vendor:product in hexadecimal.
    #[arg(long, default_value = "1209:0001")]
    id: String,
    /// Its node, instead of --id.
    #[arg(long)]
    device: Option<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// From the bulk source.
    BulkIn(ShapeArguments),
    /// To the bulk sink.
    BulkOut(ShapeArguments),
    /// From the isochronous source.
    IsochronousIn(ShapeArguments),
    /// To the isochronous sink.
    IsochronousOut(ShapeArguments),
    /// One SET_INTERFACE on interface 0, and how long it took.
    SetInterface {
        /// bAlternateSetting.
        alternate: u8,
    },
    /// A reset of the device, and how long it took.
    Reset,
    /// From the bulk source, beside another device whose SET_INTERFACE hangs; see `vm_tests::neighbours`.
    BesideHang {
        /// The other device, vendor:product in hexadecimal.
        other: String,
        /// A file of debugfs that is a register of the controller.
        #[arg(long)]
        register: PathBuf,
        /// How often it hangs.
        #[arg(long, default_value_t = 2)]
        hangs: u32,
    },
}

#[derive(Args)]
struct ShapeArguments {
    /// Bytes of a bulk transfer or of an isochronous packet.
    #[arg(long, default_value_t = 16384)]
    size: usize,
    /// Packets of an isochronous transfer.
    #[arg(long, default_value_t = 8)]
    packets: usize,
    /// Transfers in flight.
    #[arg(long, default_value_t = 4)]
    ahead: usize,
    /// When to stop.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Stop also after so many transfers.
    #[arg(long, default_value_t = u64::MAX)]
    transfers: u64,
    /// Count bytes in pieces of so many milliseconds.
    #[arg(long, default_value_t = 250)]
    slot: u64,
}

impl ShapeArguments {
    fn shape(&self, is_isochronous: bool) -> Shape {
        Shape {
            size: self.size.max(1),
            packets: if is_isochronous { self.packets } else { 1 },
            ahead: self.ahead,
            time: Duration::from_secs_f64(self.seconds.clamp(0.0, 3600.0)),
            transfers: self.transfers,
            slot: Duration::from_millis(self.slot.max(1)),
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let path = arguments.device.map_or_else(|| stream::find_node(&arguments.id), Ok)?;
    if let Action::BesideHang { other, register, hangs } = &arguments.action {
        let report = neighbours::measure(&path, &stream::find_node(other)?, register, *hangs)?;
        println!("{}", serde_json::to_string(&report).context("report")?);
        return Ok(());
    }
    let file = stream::open(&path)?;
    let report = match arguments.action {
        Action::BulkIn(shape) => stream::bulk_in(file, shape.shape(false))?,
        Action::BulkOut(shape) => stream::bulk_out(file, shape.shape(false))?,
        Action::IsochronousIn(shape) => stream::isochronous_in(file, shape.shape(true))?,
        Action::IsochronousOut(shape) => stream::isochronous_out(file, shape.shape(true))?,
        Action::SetInterface { alternate } => {
            let start = Instant::now();
            let result = file.set_interface(0, alternate);
            return tell(start, result);
        }
        Action::Reset => {
            let start = Instant::now();
            let result = file.reset();
            return tell(start, result);
        }
        Action::BesideHang { .. } => return Ok(()),
    };
    println!("{}", serde_json::to_string(&report).context("report")?);
    Ok(())
}

fn tell(start: Instant, result: nix::Result<()>) -> Result<()> {
    let result = result.map_or_else(|errno| format!("{errno:?}"), |()| "ok".to_owned());
    println!("{}", json!({ "result": result, "seconds": start.elapsed().as_secs_f64() }));
    Ok(())
}
