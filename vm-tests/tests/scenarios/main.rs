//! The scenarios on real kernels, in one program, so that two run at once from first to last.

mod asleep;
mod assignment;
mod confinement;
mod controllers;
mod drivers;
mod firmware;
mod harness;
mod isochronous;
mod kernel;
mod keyboard;
mod neighbours;
mod plugging;
mod policy;
mod services;
mod steps;
mod stick;
mod usb_transport;
mod usbtest;
