//! `usbtest-run --suite bulk` or `--case N …`: runs the kernel's host controller test on a device and prints a table.
//! Ends with 1 when a case fails.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use vm_tests::usbtest::{Call, Device, Outcome, Suite, find_node};

/// The kernel's host controller test.
#[derive(Parser)]
struct Arguments {
    /// Node of the device, /dev/bus/usb/BBB/DDD; otherwise the first that the usbtest driver has.
    #[arg(long)]
    device: Option<PathBuf>,
    /// A list of cases with parameters that must pass.
    #[arg(long, value_enum, conflicts_with = "case")]
    suite: Option<SuiteName>,
    /// A single case.
    #[arg(long)]
    case: Option<u32>,
    /// How often.
    #[arg(long, default_value_t = 10)]
    iterations: u32,
    /// Bytes of a transfer.
    #[arg(long, default_value_t = 1024)]
    length: u32,
    /// Step from one length to the next.
    #[arg(long, default_value_t = 0)]
    vary: u32,
    /// Scatter list entries or transfers in flight.
    #[arg(long, default_value_t = 8)]
    sglen: u32,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum SuiteName {
    Bulk,
    Isochronous,
    Interrupt,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let calls = match (arguments.suite, arguments.case) {
        (Some(SuiteName::Bulk), _) => Suite::Bulk.calls().to_vec(),
        (Some(SuiteName::Isochronous), _) => Suite::Isochronous.calls().to_vec(),
        (Some(SuiteName::Interrupt), _) => Suite::Interrupt.calls().to_vec(),
        (None, Some(case)) => {
            let Arguments { iterations, length, vary, sglen, .. } = arguments;
            vec![Call { case, iterations, length, vary, sglen }]
        }
        (None, None) => bail!("either --suite or --case is needed"),
    };
    let path = arguments.device.map_or_else(find_node, Ok)?;
    let device = Device::open(&path)?;
    if !arguments.json {
        println!("{}", Outcome::HEADING);
    }
    let mut failures = 0;
    for call in calls {
        let outcome = device.run(call);
        failures += u32::from(outcome.errno != 0);
        if arguments.json {
            println!("{}", serde_json::to_string(&outcome)?);
        } else {
            println!("{}", outcome.line());
        }
    }
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
