//! TensorBoard event files: scalars and texts, written without TensorFlow.
//!
//! An event file is a list of TFRecords, each a length, its checksum, a protobuf `Event`, and its checksum
//! (masked CRC-32C). Only the handful of fields needed here are encoded, by hand.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Result, TrainError};

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new event file in `folder`, which is made if need be.
    ///
    /// A resumed run starts another file beside the old one; when `purge_from` is given, TensorBoard is told to
    /// forget points at that step and later (one more than the step resumed from).
    ///
    /// # Errors
    /// [`TrainError::Write`].
    pub fn create(folder: &Path, purge_from: Option<u64>) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(TrainError::write(folder))?;
        let now = wall_time();
        let seconds = now as u64;
        let mut number = 0;
        // TensorBoard reads the files of a folder in the order of their names.
        let (path, file) = loop {
            let path = folder.join(format!("events.out.tfevents.{seconds:010}.pt.{}.{number}", std::process::id()));
            match OpenOptions::new().create_new(true).append(true).open(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(TrainError::write(&path)(error)),
            }
        };
        let mut writer = Self { path, file };
        writer.append(&file_version(now))?;
        if let Some(step) = purge_from {
            writer.append(&session_start(now, step))?;
        }
        Ok(writer)
    }

    /// Where the events go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a point to each of several scalars; in TensorBoard a `/` in a tag makes a group.
    ///
    /// # Errors
    /// [`TrainError::Write`].
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let now = wall_time();
        self.append(&scalar_event(now, step, values))
    }

    fn append(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&tf_record(event)).map_err(TrainError::write(&self.path))
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// Length, checksum of the length, data, checksum of the data; all little-endian.
fn tf_record(data: &[u8]) -> Vec<u8> {
    let masked = |bytes: &[u8]| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8).to_le_bytes();
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), data, &masked(data)].concat()
}

// `Event`: 1 wall_time (double), 2 step (int64), 3 file_version, 5 summary, 7 session_log.
fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut bytes = vec![0x09];
    bytes.extend(wall_time.to_le_bytes());
    if step != 0 {
        bytes.push(0x10);
        varint(&mut bytes, step);
    }
    bytes
}

fn file_version(wall_time: f64) -> Vec<u8> {
    let mut bytes = event(wall_time, 0);
    field(&mut bytes, 3, b"brain.Event:2");
    bytes
}

/// `SessionLog { status: START }`: points at this step and later in earlier files are out of date.
fn session_start(wall_time: f64, step: u64) -> Vec<u8> {
    let mut bytes = event(wall_time, step);
    field(&mut bytes, 7, &[0x08, 0x01]);
    bytes
}

// `Summary.Value`: 1 tag, 2 simple_value (float).
fn scalar_event(wall_time: f64, step: u64, values: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut entry = Vec::new();
        field(&mut entry, 1, tag.as_bytes());
        entry.push(0x15);
        entry.extend((*value as f32).to_le_bytes());
        field(&mut summary, 1, &entry);
    }
    let mut bytes = event(wall_time, step);
    field(&mut bytes, 5, &summary);
    bytes
}

/// A length-delimited protobuf field; field numbers here are below 16, so the key is one byte.
fn field(bytes: &mut Vec<u8>, number: u8, content: &[u8]) {
    bytes.push(number << 3 | 2);
    varint(bytes, content.len() as u64);
    bytes.extend(content);
}

fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn records_equal_those_of_tensorboard() {
        // From tensorboard's own `RecordWriter` and `Event.SerializeToString`, wall time 1.5.
        assert_eq!(
            hex(&tf_record(&file_version(1.5))),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
        );
        assert_eq!(
            hex(&tf_record(&scalar_event(1.5, 300, &[("train/loss", 0.25)]))),
            "2100000000000000017becf609000000000000f83f10ac022a130a110a0a747261696e2f6c6f7373150000803e6557981f"
        );
        assert_eq!(hex(&session_start(1.5, 300)), "09000000000000f83f10ac023a020801");
    }

    #[test]
    fn a_file_is_records_one_after_the_other() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut writer = EventWriter::create(folder.path(), Some(2)).expect("makes");
        writer.scalars(3, &[("loss", 1.0), ("grad_norm", f64::NAN)]).expect("writes");
        let other = EventWriter::create(folder.path(), None).expect("a second file in the same second");
        assert_ne!(other.path(), writer.path());
        let bytes = std::fs::read(writer.path()).expect("reads");
        let (mut at, mut records) = (0, 0);
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize;
            assert_eq!(bytes[at..at + 16 + length], tf_record(&bytes[at + 12..at + 12 + length]));
            at += 16 + length;
            records += 1;
        }
        assert_eq!(records, 3);
    }
}
