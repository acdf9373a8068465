//! Safetensors in (memory-mapped, single or sharded) and out (atomic, sharded).
//!
//! The header is read by the `safetensors` crate, which checks offsets and sizes; nothing is allocated from a
//! size that the file only claims.

use crate::{Result, TensorError};
use memmap2::Mmap;
use pt_quant::formats::bitsandbytes;
pub use pt_quant::formats::bitsandbytes::QuantState;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, View};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Where one tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    start: usize,
    end: usize,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// Reads one `.safetensors` file or a folder of shards with its index; files are mapped, not read.
#[derive(Debug)]
pub struct SafetensorsReader {
    path: PathBuf,
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsReader {
    /// Opens `path`: a file, or a folder with `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`TensorError::Read`] for a file that cannot be opened (a missing shard by its name),
    /// [`TensorError::Format`] for one that is not safetensors, is cut off, or an index that does not fit.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Self::open_files(path, vec![path.to_path_buf()]);
        }
        let index_path = path.join(INDEX_FILE);
        if !index_path.exists() {
            return Self::open_files(path, vec![path.join(SINGLE_FILE)]);
        }
        let format = |reason: String| TensorError::Format { path: index_path.clone(), reason };
        let text =
            std::fs::read(&index_path).map_err(|source| TensorError::Read { path: index_path.clone(), source })?;
        let index: serde_json::Value = serde_json::from_slice(&text).map_err(|e| format(format!("not JSON: {e}")))?;
        let map = index["weight_map"].as_object().ok_or_else(|| format("no object `weight_map`".into()))?;
        let mut files: Vec<String> = Vec::new();
        for (name, file) in map {
            let file = file.as_str().filter(|f| Path::new(f).file_name().is_some_and(|base| base == *f));
            let file = file.ok_or_else(|| format(format!("`weight_map.{name}` is not a file name in this folder")))?;
            if !files.iter().any(|known| known == file) {
                files.push(file.to_string());
            }
        }
        files.sort();
        let reader = Self::open_files(path, files.iter().map(|file| path.join(file)).collect())?;
        match map.keys().find(|name| !reader.entries.contains_key(*name)) {
            Some(name) => Err(format(format!("`{name}` stands in the index and in no shard"))),
            None => Ok(reader),
        }
    }

    fn open_files(path: &Path, files: Vec<PathBuf>) -> Result<Self> {
        let mut reader =
            Self { path: path.into(), shards: vec![], entries: BTreeMap::new(), metadata: BTreeMap::new() };
        for file_path in files {
            let read = |source| TensorError::Read { path: file_path.clone(), source };
            let file = File::open(&file_path).map_err(read)?;
            // SAFETY: the map is read-only. Should another process cut the file meanwhile, a read faults, as with
            // every mapped checkpoint; we never write to a file in place, only rename over it.
            let map = unsafe { Mmap::map(&file) }.map_err(read)?;
            let format = |e: safetensors::SafeTensorError| TensorError::Format {
                path: file_path.clone(),
                reason: format!("not a whole safetensors file: {e}"),
            };
            let (header_len, header) = SafeTensors::read_metadata(&map).map_err(format)?;
            let data_start = header_len + 8;
            for (name, info) in header.tensors() {
                let entry = Entry {
                    shard: reader.shards.len(),
                    dtype: info.dtype,
                    shape: info.shape.iter().map(|&n| n as i64).collect(),
                    start: data_start + info.data_offsets.0,
                    end: data_start + info.data_offsets.1,
                };
                if reader.entries.insert(name.clone(), entry).is_some() {
                    let reason = format!("`{name}` stands in an earlier shard too");
                    return Err(TensorError::Format { path: file_path, reason });
                }
            }
            reader.metadata.extend(header.metadata().clone().unwrap_or_default());
            reader.shards.push(Shard { path: file_path, map });
        }
        Ok(reader)
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The `__metadata__` of all shards.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Shape of a tensor, or `None` when it is not there.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Kind of a tensor as stored, or `None` when it is not there or libtorch has no such kind.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        self.entries.get(name).and_then(|entry| kind_of(entry.dtype))
    }

    /// A tensor as stored, copied to `device`.
    ///
    /// # Errors
    /// [`TensorError::MissingTensor`]; [`TensorError::Format`] for a dtype that libtorch does not have.
    pub fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        let entry = self.entries.get(name);
        let entry = entry.ok_or_else(|| TensorError::MissingTensor { path: self.path.clone(), name: name.into() })?;
        let shard = &self.shards[entry.shard];
        let kind = kind_of(entry.dtype).ok_or_else(|| TensorError::Format {
            path: shard.path.clone(),
            reason: format!("`{name}` has dtype {:?}, which is not supported", entry.dtype),
        })?;
        let bytes = &shard.map[entry.start..entry.end];
        Ok(Tensor::f_from_data_size(bytes, &entry.shape, kind)?.to_device(device))
    }

    /// Names of the weights that are stored in bitsandbytes' 4 bits; their other parts are named after them.
    pub fn block4_names(&self) -> impl Iterator<Item = &str> {
        self.names()
            .filter_map(|name| BLOCK4_STATES.iter().find_map(|state| name.strip_suffix(state)?.strip_suffix('.')))
    }

    /// Shape and form of the 4-bit tensor `name` from its description alone, `None` when it is not stored so.
    ///
    /// # Errors
    /// [`TensorError::Format`] when the description is not right.
    pub fn block4_state(&self, name: &str) -> Result<Option<QuantState>> {
        let find = |state: &str| self.entries.get_key_value(&format!("{name}.{state}"));
        let Some((key, entry)) = BLOCK4_STATES.iter().find_map(|state| find(state)) else { return Ok(None) };
        let shard = &self.shards[entry.shard];
        let format = |e: pt_quant::QuantError| TensorError::Format { path: shard.path.clone(), reason: e.to_string() };
        QuantState::parse(key, &shard.map[entry.start..entry.end]).map(Some).map_err(format)
    }

    /// The 4-bit tensor `name`, `None` when it is not stored so. Its parts may be spread over shards.
    ///
    /// # Errors
    /// [`TensorError::Format`] when the parts do not fit together.
    pub(crate) fn block4(&self, name: &str) -> Result<Option<bitsandbytes::Loaded>> {
        if !BLOCK4_STATES.iter().any(|state| self.entries.contains_key(&format!("{name}.{state}"))) {
            return Ok(None);
        }
        let is_part = |found: &str| found == name || found.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
        let parts = self.entries.iter().filter(|(found, _)| is_part(found));
        let format = |reason: String| TensorError::Format { path: self.path.clone(), reason };
        let views = parts.map(|(found, entry)| {
            let shape = entry.shape.iter().map(|&n| n as usize).collect();
            let view = TensorView::new(entry.dtype, shape, &self.shards[entry.shard].map[entry.start..entry.end]);
            view.map(|view| (found, view)).map_err(|e| format(format!("`{found}`: {e}")))
        });
        // Put together as one small file, which is what the reader of that format takes.
        let bytes =
            safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None).map_err(|e| format(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| format(e.to_string()))?;
        bitsandbytes::read_owned(&file, name).map(Some).map_err(|e| format(e.to_string()))
    }
}

/// What the names of the descriptions of 4-bit tensors end in.
const BLOCK4_STATES: [&str; 2] = ["quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"];

/// A tensor of another crate's making, copied.
pub(crate) fn tensor_of(view: &impl View) -> Result<Tensor> {
    let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
    let kind = kind_of(view.dtype())
        .ok_or_else(|| TensorError::argument("dtype", format!("{:?}", view.dtype()), "one that libtorch has"))?;
    Ok(Tensor::f_from_data_size(&view.data(), &shape, kind)?)
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::BOOL => Kind::Bool,
        Dtype::U8 => Kind::Uint8,
        Dtype::I8 => Kind::Int8,
        Dtype::I16 => Kind::Int16,
        Dtype::I32 => Kind::Int,
        Dtype::I64 => Kind::Int64,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        _ => return None,
    })
}

fn dtype_name(kind: Kind) -> Option<(&'static str, usize)> {
    Some(match kind {
        Kind::Bool => ("BOOL", 1),
        Kind::Uint8 => ("U8", 1),
        Kind::Int8 => ("I8", 1),
        Kind::Int16 => ("I16", 2),
        Kind::Int => ("I32", 4),
        Kind::Int64 => ("I64", 8),
        Kind::Half => ("F16", 2),
        Kind::BFloat16 => ("BF16", 2),
        Kind::Float => ("F32", 4),
        Kind::Double => ("F64", 8),
        _ => return None,
    })
}

/// Writes a file so that at every moment either the old one or the whole new one stands under its name: to a
/// temporary name in the same folder, synced, renamed.
///
/// # Errors
/// [`TensorError::Write`]; the temporary file is gone and what stood there before still stands.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let attempt = || -> std::io::Result<()> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".tmp-");
        // Temporary files are private by default; this one becomes a result, which is as readable as other files.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(folder)?;
        let mut buffered = std::io::BufWriter::with_capacity(1 << 20, file.as_file_mut());
        write(&mut buffered)?;
        buffered.flush()?;
        drop(buffered);
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        File::open(folder)?.sync_all()
    };
    attempt().map_err(|source| TensorError::Write { path: path.into(), source })
}

/// Saves tensors, in name order, to one safetensors file, atomically, one tensor in memory at a time.
///
/// # Errors
/// [`TensorError::Write`]; [`TensorError::Argument`] for a kind that safetensors does not have.
pub fn save_safetensors(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) -> Result<()> {
    let mut sorted: Vec<&(String, Tensor)> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        let metadata: serde_json::Map<_, _> = metadata.iter().map(|(k, v)| (k.to_string(), (*v).into())).collect();
        header.insert("__metadata__".into(), metadata.into());
    }
    let mut offset = 0;
    for (name, tensor) in &sorted {
        let (dtype, size) = dtype_name(tensor.kind()).ok_or_else(|| {
            TensorError::argument(name, format!("{:?}", tensor.kind()), "a kind that safetensors has")
        })?;
        let end = offset + tensor.numel() * size;
        let entry = serde_json::json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": [offset, end]});
        if header.insert(name.clone(), entry).is_some() {
            return Err(TensorError::argument("tensors", format!("`{name}` twice"), "each name once"));
        }
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // Data starts at a multiple of 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    write_atomically(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, tensor) in &sorted {
            let flat = tch::no_grad(|| tensor.detach().to_device(Device::Cpu).contiguous().view(-1));
            let (_, size) = dtype_name(flat.kind()).unwrap_or(("", 0));
            let mut bytes = vec![0u8; flat.numel() * size];
            flat.f_copy_data_u8(&mut bytes, flat.numel()).map_err(std::io::Error::other)?;
            out.write_all(&bytes)?;
        }
        Ok(())
    })
}

/// Fills a new folder so that it appears whole or not at all: under a temporary name beside its place, then renamed.
///
/// # Errors
/// Those of `fill`, and [`TensorError::Write`], also when `folder` is there already and not empty; the temporary
/// folder is gone then.
pub fn create_folder_atomically<E: From<TensorError>>(
    folder: &Path,
    fill: impl FnOnce(&Path) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let write_error = |source| TensorError::Write { path: folder.into(), source };
    let parent = folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(write_error)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tmp-");
    // As for files: the folder becomes a result, which is as readable as others.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let partial = builder.tempdir_in(parent).map_err(write_error)?;
    fill(partial.path())?;
    std::fs::rename(partial.path(), folder).map_err(write_error)?;
    // The name that would be removed now belongs to nobody.
    let _ = partial.keep();
    Ok(File::open(parent).and_then(|parent| parent.sync_all()).map_err(write_error)?)
}

/// Weights in one file.
const SINGLE_FILE: &str = "model.safetensors";
/// Which shard holds which tensor.
const INDEX_FILE: &str = "model.safetensors.index.json";

fn shard_name(number: usize, count: usize) -> String {
    format!("model-{number:05}-of-{count:05}.safetensors")
}

/// Whether a file bears a name that [`shard_name`] gives.
fn is_shard_name(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let numbers =
        numbers.and_then(|rest| rest.split_once("-of-")).map(|(number, count)| (number.parse(), count.parse()));
    matches!(numbers, Some((Ok(number), Ok(count))) if shard_name(number, count) == name)
}

/// Saves a model as Hugging Face does: `model.safetensors`, or shards of at most `max_shard_bytes` with an index.
///
/// Weights that an earlier save left in the folder are removed. At every moment the folder opens as the old model or
/// as the new one, or, while shards of the same names are exchanged, as none; never as a mixture: the index is
/// written last, so a folder with an index is whole.
///
/// # Errors
/// Those of [`save_safetensors`].
pub fn save_sharded(folder: &Path, tensors: &[(String, Tensor)], max_shard_bytes: usize) -> Result<()> {
    let metadata = [("format", "pt")];
    let bytes = |t: &Tensor| t.numel() * dtype_name(t.kind()).map_or(0, |(_, size)| size);
    let mut shards: Vec<Vec<(String, Tensor)>> = vec![vec![]];
    let (mut filled, mut total) = (0, 0);
    for (name, tensor) in tensors {
        let size = bytes(tensor);
        if filled > 0 && filled + size > max_shard_bytes {
            shards.push(vec![]);
            filled = 0;
        }
        filled += size;
        total += size;
        if let Some(last) = shards.last_mut() {
            last.push((name.clone(), tensor.shallow_clone()));
        }
    }
    let index_path = folder.join(INDEX_FILE);
    if shards.len() == 1 {
        save_safetensors(&folder.join(SINGLE_FILE), tensors, &metadata)?;
        // The index decides what is read, so the new file counts from here on; then the old shards are waste.
        return remove_if_there(&index_path).and_then(|()| remove_weights_but(folder, &[SINGLE_FILE.into()]));
    }
    let files: Vec<String> = (1..=shards.len()).map(|number| shard_name(number, shards.len())).collect();
    if files.iter().any(|file| folder.join(file).exists()) {
        // The old index would read the first new shards together with the last old ones.
        remove_if_there(&index_path)?;
        remove_if_there(&folder.join(SINGLE_FILE))?;
    }
    let mut weight_map = serde_json::Map::new();
    for (shard, file) in shards.iter().zip(&files) {
        save_safetensors(&folder.join(file), shard, &metadata)?;
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_atomically(&index_path, |out| Ok(serde_json::to_writer_pretty(out, &index)?))?;
    // Other readers prefer a single file to the index.
    remove_weights_but(folder, &files)
}

fn remove_if_there(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(TensorError::Write { path: path.into(), source })
        }
        _ => Ok(()),
    }
}

/// Removes the weight files of a folder that are not among `kept`.
fn remove_weights_but(folder: &Path, kept: &[String]) -> Result<()> {
    let read = |source| TensorError::Read { path: folder.into(), source };
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let name = entry.map_err(read)?.file_name();
        let name = name.to_string_lossy();
        if (name == SINGLE_FILE || is_shard_name(&name)) && !kept.iter().any(|kept| *kept == name) {
            remove_if_there(&folder.join(name.as_ref()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<(String, Tensor)> {
        vec![
            ("b".into(), Tensor::from_slice(&[1f32, -2., 3.5, 0.]).view([2, 2])),
            ("a".into(), Tensor::from_slice(&[7i64])),
            ("c".into(), Tensor::from_slice(&[0.5f32, 1.5]).to_kind(Kind::BFloat16)),
        ]
    }

    #[test]
    fn tensors_survive_the_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        save_safetensors(&path, &sample(), &[("format", "pt")]).unwrap();
        let reader = SafetensorsReader::open(&path).unwrap();
        assert_eq!(reader.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(reader.metadata()["format"], "pt");
        for (name, tensor) in sample() {
            let read = reader.tensor(&name, Device::Cpu).unwrap();
            assert_eq!((read.kind(), &read), (tensor.kind(), &tensor));
        }
        assert!(reader.tensor("d", Device::Cpu).unwrap_err().to_string().contains("no tensor `d`"));
    }

    #[test]
    fn shards_read_as_one() {
        let folder = tempfile::tempdir().unwrap();
        save_sharded(folder.path(), &sample(), 8).unwrap();
        assert!(folder.path().join("model-00003-of-00003.safetensors").exists());
        let reader = SafetensorsReader::open(folder.path()).unwrap();
        assert_eq!(reader.shape("b"), Some(&[2i64, 2][..]));
        std::fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
        let error = SafetensorsReader::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("model-00002-of-00003"), "{error}");
    }

    #[test]
    fn a_save_over_another_leaves_nothing_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let first =
            || vec![("a".into(), Tensor::from_slice(&[1f32, 2.])), ("b".into(), Tensor::from_slice(&[3f32, 4.]))];
        let second =
            || vec![("a".into(), Tensor::from_slice(&[5f32, 6.])), ("b".into(), Tensor::from_slice(&[7f32, 8.]))];
        // At most 8 bytes a file make two shards, 100 make one file.
        for (before, after) in [(8, 100), (100, 8), (8, 8)] {
            save_sharded(folder.path(), &first(), before).unwrap();
            std::fs::write(folder.path().join("model-card.safetensors"), "not ours").unwrap();
            save_sharded(folder.path(), &second(), after).unwrap();
            let reader = SafetensorsReader::open(folder.path()).unwrap();
            assert_eq!(reader.tensor("a", Device::Cpu).unwrap(), second()[0].1, "{before}, then {after}");
            let mut files: Vec<String> = std::fs::read_dir(folder.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            files.sort();
            let want: &[&str] = match after {
                100 => &["model-card.safetensors", "model.safetensors"],
                _ => &[
                    "model-00001-of-00002.safetensors",
                    "model-00002-of-00002.safetensors",
                    "model-card.safetensors",
                    "model.safetensors.index.json",
                ],
            };
            assert_eq!(files, want, "{before}, then {after}");
        }
    }

    #[test]
    fn shards_over_shards_of_the_same_names_are_never_read_as_a_mixture() {
        let folder = tempfile::tempdir().unwrap();
        let floats = |x: f32| Tensor::from_slice(&[x, x]);
        save_sharded(folder.path(), &[("a".into(), floats(1.)), ("b".into(), floats(2.))], 8).unwrap();
        // The second shard holds a kind that safetensors does not have, so the save stops after the first.
        let bad = Tensor::zeros([2], (Kind::ComplexFloat, Device::Cpu));
        assert!(
            save_sharded(folder.path(), &[("a".into(), floats(3.)), ("b".into(), floats(4.)), ("c".into(), bad)], 8)
                .is_err()
        );
        assert!(SafetensorsReader::open(folder.path()).is_err());
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("deep/result");
        let failed = create_folder_atomically(&folder, |partial| {
            std::fs::write(partial.join("x"), "x").unwrap();
            Err(TensorError::argument("x", 1, "2"))
        });
        assert!(matches!(failed, Err(TensorError::Argument { .. })));
        assert_eq!(std::fs::read_dir(parent.path().join("deep")).unwrap().count(), 0);
        create_folder_atomically(&folder, |partial| -> Result<()> {
            std::fs::write(partial.join("x"), "x").unwrap();
            Ok(())
        })
        .unwrap();
        assert!(folder.join("x").exists());
        assert_eq!(std::fs::read_dir(parent.path().join("deep")).unwrap().count(), 1);
    }

    #[test]
    fn every_prefix_of_a_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        save_safetensors(&path, &sample(), &[]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(SafetensorsReader::open(&path).is_err(), "a prefix of {len} bytes was read");
        }
    }

    #[test]
    fn headers_that_lie_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        for header in [
            r#"{"a":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400000000000]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
            r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}"#,
        ] {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([0; 4]);
            std::fs::write(&path, &bytes).unwrap();
            assert!(SafetensorsReader::open(&path).is_err(), "{header}");
        }
        std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert!(SafetensorsReader::open(&path).is_err());
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        write_atomically(&path, |out| out.write_all(b"old")).unwrap();
        let failed = write_atomically(&path, |out| {
            out.write_all(b"new")?;
            Err(std::io::ErrorKind::StorageFull.into())
        });
        assert!(failed.unwrap_err().hint().unwrap().contains("disk is full"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
