//! GGUF files, versions 2 and 3: metadata, tensor table, tensors as f32.
//!
//! Everything that the header claims is checked against the size of the file before it is believed: a count or a
//! length that cannot be true is an error, and nothing is allocated for it. Tensors are read one at a time, where
//! they lie; only the header stays in memory.

mod dequantize;
mod metadata;
mod names;

pub use dequantize::{GgmlType, dequantize};
pub use metadata::{Array, Metadata, Value};
pub(crate) use names::{Layout, Placement, deinterleave_heads, placement};

use crate::error::nearest;
use crate::{ModelError, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The largest header that is read. Real ones are a few megabytes, nearly all of it vocabulary.
const MAX_HEADER_BYTES: u64 = 1 << 30;
const MAX_NAME_BYTES: u64 = 65_535;
const MAX_DIMENSIONS: u32 = 4;

/// Where one tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Shape as torch has it: slowest dimension first (the file has the fastest first).
    pub shape: Vec<i64>,
    /// Storage type.
    pub ggml_type: GgmlType,
    /// First byte, counted from the start of the file.
    pub start: u64,
    /// Length in bytes.
    pub num_bytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

trait Source: Read + Seek + Send {}
impl<T: Read + Seek + Send> Source for T {}

/// An open GGUF file.
pub struct Gguf {
    path: PathBuf,
    source: Mutex<Box<dyn Source>>,
    metadata: Metadata,
    tensors: BTreeMap<String, TensorInfo>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf").field("path", &self.path).field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`ModelError::Read`]; [`ModelError::Gguf`] for a file that is cut off or whose header does not hold.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |source| ModelError::Read { path: path.into(), source };
        let file = File::open(path).map_err(read)?;
        Self::from_source(path, file)
    }

    /// Reads a file that is already in memory; `path` stands in errors only.
    ///
    /// # Errors
    /// [`ModelError::Gguf`].
    pub fn from_bytes(path: &Path, bytes: impl AsRef<[u8]> + Send + 'static) -> Result<Self> {
        Self::from_source(path, std::io::Cursor::new(bytes))
    }

    fn from_source(path: &Path, mut source: impl Source + 'static) -> Result<Self> {
        let read = |source| ModelError::Read { path: path.into(), source };
        let file_len = source.seek(SeekFrom::End(0)).map_err(read)?;
        source.rewind().map_err(read)?;
        let mut header = Header { path, inner: BufReader::with_capacity(1 << 16, &mut source), offset: 0, file_len };
        let (metadata, tensors) = header.parse()?;
        Ok(Self { path: path.into(), source: Mutex::new(Box::new(source)), metadata, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors by the names of the file, sorted.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Where a tensor lies.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| ModelError::MissingTensor {
            path: self.path.clone(),
            name: name.into(),
            near: nearest(name, self.tensors.keys().map(String::as_str)),
        })
    }

    /// A tensor's bytes as stored.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`]; [`ModelError::Read`], also when the file has shrunk since it was opened.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let info = self.info(name)?;
        self.part(info, 0..info.num_bytes)
    }

    /// Some of a tensor's bytes; the range lies in it.
    pub(crate) fn part(&self, info: &TensorInfo, range: Range<u64>) -> Result<Vec<u8>> {
        // Checked against the file's length when the header was read.
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        let attempt =
            source.seek(SeekFrom::Start(info.start + range.start)).and_then(|_| source.read_exact(&mut bytes));
        attempt.map_err(|source| ModelError::Read { path: self.path.clone(), source })?;
        Ok(bytes)
    }

    /// A tensor's elements, `info(name)?.shape` in row-major order.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes); [`ModelError::StorageType`] for a type that cannot be dequantized yet.
    pub fn dequantized(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.info(name)?;
        self.dequantize_bytes(name, info, &self.bytes(name)?)
    }

    pub(crate) fn dequantize_bytes(&self, name: &str, info: &TensorInfo, bytes: &[u8]) -> Result<Vec<f32>> {
        dequantize(info.ggml_type, bytes).ok_or_else(|| ModelError::StorageType {
            path: self.path.clone(),
            name: name.into(),
            found: info.ggml_type.name().into(),
            expected: GgmlType::dequantized_names(),
        })
    }
}

type Parsed = (Metadata, BTreeMap<String, TensorInfo>);

/// Reads forward through the header, knowing how much of the file is left.
struct Header<'a, R> {
    path: &'a Path,
    inner: R,
    offset: u64,
    file_len: u64,
}

impl<R: Read> Header<'_, R> {
    fn error(&self, reason: impl Into<String>) -> ModelError {
        ModelError::Gguf { path: self.path.into(), offset: self.offset, reason: reason.into() }
    }

    /// The bytes that are left, up to the largest header.
    fn remaining(&self) -> u64 {
        self.file_len.min(MAX_HEADER_BYTES) - self.offset
    }

    fn take(&mut self, len: u64, what: &str) -> Result<Vec<u8>> {
        if len > self.remaining() {
            return Err(self.error(format!("{what} takes {len} bytes, {} are left", self.remaining())));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.inner.read_exact(bytes).map_err(|source| ModelError::Read { path: self.path.into(), source })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        if N as u64 > self.remaining() {
            return Err(self.error(format!("the file ends in {what}")));
        }
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        String::from_utf8(bytes).map_err(|_| self.error(format!("{what} is not UTF-8")))
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() as u64 > MAX_NAME_BYTES {
            return Err(self.error(format!("{what} is {} bytes long, expected 1 to {MAX_NAME_BYTES}", name.len())));
        }
        Ok(name)
    }

    fn parse(&mut self) -> Result<Parsed> {
        if &self.array::<4>("the magic number")? != b"GGUF" {
            self.offset = 0;
            return Err(self.error("it does not begin with `GGUF`"));
        }
        let version = self.u32("the version")?;
        match version {
            2 | 3 => {}
            v if v.swap_bytes() <= 3 => return Err(self.error("it is big-endian, only little-endian files are read")),
            v => return Err(self.error(format!("its version is {v}, expected 2 or 3"))),
        }
        let tensor_count = self.u64("the number of tensors")?;
        let metadata_count = self.u64("the number of metadata entries")?;
        let mut metadata = Metadata::default();
        for _ in 0..metadata_count {
            let key = self.name("a metadata key")?;
            let kind = self.u32(&key)?;
            let value = self.value(&key, kind)?;
            if metadata.insert(key.clone(), value) {
                return Err(self.error(format!("metadata `{key}` stands there twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(other) => return Err(self.error(format!("general.alignment is {other}, expected a power of two"))),
        };
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let (name, info) = self.tensor_info()?;
            if !info.start.is_multiple_of(alignment) {
                let reason = format!("tensor `{name}` starts at {}, which is no multiple of {alignment}", info.start);
                return Err(self.error(reason));
            }
            if tensors.insert(name.clone(), info).is_some() {
                return Err(self.error(format!("tensor `{name}` stands there twice")));
            }
        }
        self.place(&mut tensors, alignment)?;
        Ok((metadata, tensors))
    }

    /// One row of the tensor table; `start` still counts from the start of the data.
    fn tensor_info(&mut self) -> Result<(String, TensorInfo)> {
        let name = self.name("a tensor name")?;
        let num_dimensions = self.u32(&name)?;
        if num_dimensions == 0 || num_dimensions > MAX_DIMENSIONS {
            return Err(
                self.error(format!("tensor `{name}` has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"))
            );
        }
        let mut shape = Vec::with_capacity(num_dimensions as usize);
        let mut num_elements = 1u64;
        for _ in 0..num_dimensions {
            let size = self.u64(&name)?;
            num_elements = num_elements.checked_mul(size).filter(|&n| n > 0 && n < 1 << 48).ok_or_else(|| {
                self.error(format!("tensor `{name}` has a dimension of {size}: empty, or more than any file holds"))
            })?;
            shape.push(size as i64);
        }
        let type_id = self.u32(&name)?;
        let ggml_type = GgmlType::from_id(type_id)
            .ok_or_else(|| self.error(format!("tensor `{name}` has the unknown storage type {type_id}")))?;
        let (block_size, block_bytes) = ggml_type.block();
        if !(shape[0] as u64).is_multiple_of(block_size) {
            let found = format!("tensor `{name}` has rows of {} elements", shape[0]);
            return Err(self.error(format!("{found}, expected a multiple of {block_size} ({})", ggml_type.name())));
        }
        let num_bytes = num_elements / block_size * block_bytes;
        let start = self.u64(&name)?;
        shape.reverse();
        Ok((name, TensorInfo { shape, ggml_type, start, num_bytes }))
    }

    /// Turns data offsets into file offsets, and refuses tensors outside the file or on top of each other.
    fn place(&self, tensors: &mut BTreeMap<String, TensorInfo>, alignment: u64) -> Result<()> {
        let data_start = self.offset.next_multiple_of(alignment);
        for (name, info) in tensors.iter_mut() {
            let end = data_start.checked_add(info.start).and_then(|start| start.checked_add(info.num_bytes));
            if end.is_none_or(|end| end > self.file_len) {
                let wanted =
                    format!("tensor `{name}` takes {} bytes from byte {} of the data", info.num_bytes, info.start);
                let held = self.file_len.saturating_sub(data_start);
                return Err(self.error(format!("{wanted}, the file holds {held} bytes of data")));
            }
            info.start += data_start;
        }
        let mut by_start: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
        by_start.sort_by_key(|(_, info)| info.start);
        for pair in by_start.windows(2) {
            let ((first_name, first), (second_name, second)) = (pair[0], pair[1]);
            if first.start + first.num_bytes > second.start {
                return Err(self.error(format!("tensors `{first_name}` and `{second_name}` overlap")));
            }
        }
        Ok(())
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            8 => Value::String(self.string(key)?),
            9 => Value::Array(self.value_array(key, 0)?),
            _ => {
                let size = self.scalar_size(key, kind)?;
                let bytes = self.take(size, key)?;
                metadata::scalar(kind, &bytes).ok_or_else(|| self.error(format!("metadata `{key}` has type {kind}")))?
            }
        })
    }

    fn scalar_size(&self, key: &str, kind: u32) -> Result<u64> {
        metadata::scalar_size(kind).ok_or_else(|| self.error(format!("metadata `{key}` has the unknown type {kind}")))
    }

    fn value_array(&mut self, key: &str, depth: usize) -> Result<Array> {
        let kind = self.u32(key)?;
        let len = self.u64(key)?;
        // The least that an element takes in the file: a length prefix, or a kind and a length.
        let least = match kind {
            8 => 8,
            9 => 12,
            _ => self.scalar_size(key, kind)?,
        };
        if len > self.remaining() / least {
            return Err(
                self.error(format!("metadata `{key}` lists {len} elements, {} bytes are left", self.remaining()))
            );
        }
        match kind {
            8 => Ok(Array::Strings((0..len).map(|_| self.string(key)).collect::<Result<_>>()?)),
            9 if depth == 3 => Err(self.error(format!("metadata `{key}` nests lists more than 4 deep"))),
            9 => Ok(Array::Arrays((0..len).map(|_| self.value_array(key, depth + 1)).collect::<Result<_>>()?)),
            _ => Ok(Array::Scalars { kind, bytes: self.take(len * least, key)? }),
        }
    }
}
