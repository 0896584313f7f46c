//! `gadget up NAME --function sourcesink --speed super`, `gadget unplug|plug|down NAME`: devices of the kernel's gadget
//! functions on `dummy_hcd`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use common::ids::VendorProduct;
use vm_tests::gadget::{self, Function, Speed};

/// Devices of the kernel's gadget functions.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Make a gadget and plug it in.
    Up {
        /// Its name, also its serial number.
        name: String,
        /// What it does; several for a composite device, with the ids of the first.
        #[arg(long, value_enum, required = true)]
        function: Vec<FunctionName>,
        /// The fastest speed it offers.
        #[arg(long, value_enum, default_value = "high")]
        speed: SpeedName,
        /// The file of a disk.
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// Pull it.
    Unplug {
        /// Its name.
        name: String,
    },
    /// Plug it in again.
    Plug {
        /// Its name.
        name: String,
        /// As this VENDOR:PRODUCT from now on.
        #[arg(long)]
        id: Option<VendorProduct>,
    },
    /// Pull and remove it.
    Down {
        /// Its name.
        name: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum FunctionName {
    Sourcesink,
    Loopback,
    Storage,
    Acm,
    Ncm,
    Ecm,
    Keyboard,
}

#[derive(Clone, Copy, ValueEnum)]
enum SpeedName {
    Full,
    High,
    Super,
}

fn main() -> Result<()> {
    match Arguments::parse().action {
        Action::Up { name, function, speed, file } => {
            let functions = function.into_iter().map(|function| {
                Ok(match function {
                    FunctionName::Sourcesink => Function::SourceSink,
                    FunctionName::Loopback => Function::Loopback,
                    FunctionName::Storage => Function::Storage(file.clone().context("a disk needs --file")?),
                    FunctionName::Acm => Function::Acm,
                    FunctionName::Ncm => Function::Ncm,
                    FunctionName::Ecm => Function::Ecm,
                    FunctionName::Keyboard => Function::Keyboard,
                })
            });
            let functions: Vec<Function> = functions.collect::<Result<_>>()?;
            let speed = match speed {
                SpeedName::Full => Speed::Full,
                SpeedName::High => Speed::High,
                SpeedName::Super => Speed::Super,
            };
            println!("{}", gadget::up(&name, &functions, speed)?);
        }
        Action::Unplug { name } => gadget::unplug(&name)?,
        Action::Plug { name, id } => println!("{}", gadget::plug(&name, id)?),
        Action::Down { name } => gadget::down(&name)?,
    }
    Ok(())
}
