//! A new adapter, or one from a folder.

use super::bias::Biases;
use super::embedding::{EmbeddingFactors, TokenRows};
use super::factors::Factors;
use super::options::Start;
use super::start::Place;
use super::{LoraAdapter, LoraConfig};
use crate::adapter::State;
use crate::base::Base;
use crate::config::Modules;
use crate::saved::SavedModules;
use crate::target::{Strictness, is_suffix, no_match, pattern_value, target_layers};
use crate::{PeftError, Result, files};
use pt_model::Linear;
use pt_tensor::{Tensor, no_grad};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What gets an update. Nothing of it is allocated yet.
struct Plan<'a> {
    layers: Vec<(&'a Linear, Update)>,
    embedding: Option<Update>,
}

#[derive(Debug, Clone, Copy)]
struct Update {
    rank: i64,
    scaling: f64,
}

/// What is trained beside the updates, copied from the model.
struct Copies {
    saved: SavedModules,
    biases: Biases,
    tokens: Option<TokenRows>,
}

fn fault(fault: String) -> PeftError {
    PeftError::Config { faults: vec![fault] }
}

impl<'a> Plan<'a> {
    /// The layers that get an update, in model order, and the embedding.
    fn new(config: &LoraConfig, base: &Base<'a>, saved: &SavedModules, strictness: Strictness) -> Result<Self> {
        let mut paths: Vec<&str> = base.layers.iter().map(|layer| layer.path.as_str()).collect();
        let is_listed = !config.target_modules.is_all_linear();
        paths.extend(base.embedding.as_ref().filter(|_| is_listed).map(|embedding| embedding.path.as_str()));
        let mut targets = target_layers(&config.targets(), &paths, base.output, strictness)?;
        targets.retain(|&position| !saved.contains(&format!("{}.weight", paths[position])));
        let mut plan = Self { layers: vec![], embedding: None };
        for position in targets {
            let path = paths[position];
            let rank = *pattern_value("rank_pattern", &config.rank_pattern, path)?.unwrap_or(&config.rank);
            let alpha = *pattern_value("alpha_pattern", &config.alpha_pattern, path)?.unwrap_or(&config.lora_alpha);
            let update = Update { rank, scaling: config.scaling(rank, alpha) };
            match base.layers.get(position) {
                Some(&layer) => plan.layers.push((layer, update)),
                None => plan.embedding = Some(update),
            }
        }
        if plan.embedding.is_some() && config.lora_bias {
            return Err(fault("`lora_bias` with an update of the embedding, expected none there, as in PEFT".into()));
        }
        Ok(plan)
    }

    /// The last parts of the paths of the layers, each once.
    fn short_names(&self) -> Vec<String> {
        let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
        self.layers.iter().map(|(layer, _)| last(&layer.path)).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Names (after the prefix) and shapes of the updates' tensors in files.
    fn shapes(&self, config: &LoraConfig, base: &Base<'_>) -> BTreeMap<String, Vec<i64>> {
        let mut shapes = BTreeMap::new();
        let mut add = |path: &str, parts: [(&str, Option<Vec<i64>>); 4]| {
            let parts = parts.into_iter().filter_map(|(part, shape)| Some((format!("{path}.{part}"), shape?)));
            shapes.extend(parts);
        };
        for (layer, Update { rank, .. }) in &self.layers {
            let (out_features, in_features) = layer.weight.size();
            let parts = [
                ("lora_A.weight", Some(vec![*rank, in_features])),
                ("lora_B.weight", Some(vec![out_features, *rank])),
                ("lora_B.bias", config.lora_bias.then(|| vec![out_features])),
                ("lora_magnitude_vector", config.use_dora.then(|| vec![out_features])),
            ];
            add(&layer.path, parts);
        }
        if let (Some(Update { rank, .. }), Some(embedding)) = (self.embedding, &base.embedding) {
            let size = embedding.table.size();
            let parts = [
                ("lora_embedding_A", Some(vec![rank, size[0]])),
                ("lora_embedding_B", Some(vec![size[1], rank])),
                ("lora_magnitude_vector", config.use_dora.then(|| vec![size[1]])),
                ("", None),
            ];
            add(&embedding.path, parts);
        }
        shapes
    }
}

impl Copies {
    fn new(config: &LoraConfig, base: &Base<'_>, plan: &Plan<'_>, saved: SavedModules) -> Result<Self> {
        let targets: Vec<&str> = plan.layers.iter().map(|(layer, _)| layer.path.as_str()).collect();
        let biases = Biases::copies(config.bias, base, &targets, &saved)?;
        let tokens = Self::tokens(config, base, plan, &saved)?;
        Ok(Self { saved, biases, tokens })
    }

    fn tokens(
        config: &LoraConfig,
        base: &Base<'_>,
        plan: &Plan<'_>,
        saved: &SavedModules,
    ) -> Result<Option<TokenRows>> {
        let field = "trainable_token_indices";
        let Some(tokens) = &config.trainable_token_indices else { return Ok(None) };
        let Some(embedding) = &base.embedding else {
            return Err(no_match(field, vec!["the input embedding".into()], &[]));
        };
        let others: Vec<String> = tokens
            .modules()
            .into_iter()
            .filter(|name| !is_suffix(&embedding.path, name))
            .map(ToString::to_string)
            .collect();
        if !others.is_empty() {
            return Err(no_match(field, others, &[&embedding.path]));
        }
        let whole = |path: &str| saved.contains(&format!("{path}.weight"));
        if plan.embedding.is_some() || whole(&embedding.path) {
            return Err(fault(format!("`{field}` while `{}` is trained otherwise, expected one way", embedding.path)));
        }
        let output = base.output.filter(|_| base.is_output_tied).map(|position| base.layers[position]);
        if let Some(layer) = output
            && (whole(&layer.path) || plan.layers.iter().any(|(planned, _)| planned.index == layer.index))
        {
            return Err(fault(format!("`{field}` while `{}`, which is tied, is trained otherwise", layer.path)));
        }
        Ok(Some(TokenRows::copies(embedding, &tokens.ids(), output.map(|layer| layer.index))?))
    }
}

impl LoraAdapter {
    /// A new adapter for a [`CausalLm`](pt_model::CausalLm), or for linear layers of a model of one's own: A uniform in ±1/√in_features
    /// (PEFT's Kaiming with a = √5), B zero, unless `init_lora_weights` says otherwise; what is trained whole is copied. Each tensor has its own random stream from `seed`
    /// and its name, so a layer starts the same whatever other layers are adapted.
    ///
    /// # Errors
    /// [`PeftError::Config`](crate::PeftError::Config) for settings that cannot be, [`PeftError::NoMatch`](crate::PeftError::NoMatch) for names that the model does not
    /// have, [`PeftError::Pattern`](crate::PeftError::Pattern); [`PeftError::Tensor`](crate::PeftError::Tensor) when there is no memory for a rank.
    ///
    /// # Example
    /// LoRA on a tch model that is not ours: name its linear layers, and ask the adapter where the layer would compute.
    /// ```
    /// use pt_model::{Linear, Sites};
    /// use pt_peft::{Adapter, LoraAdapter, LoraConfig};
    /// use pt_tensor::{Device, Kind, Tensor};
    /// let weight = Tensor::eye(4, (Kind::Float, Device::Cpu)); // [out_features, in_features]
    /// let mut layers = [Linear::dense(0, "encoder.proj", weight, None)?];
    /// let config = LoraConfig { rank: 2, lora_alpha: 2.0, ..LoraConfig::default() };
    /// let adapter = LoraAdapter::new(config, layers.as_slice(), 0)?;
    /// let x = Tensor::ones([1, 4], (Kind::Float, Device::Cpu));
    /// assert_eq!(adapter.linear(&layers[0], &x)?, x); // B is zero
    /// // Train `adapter.parameters()`, then save it, or put the update into the weights.
    /// adapter.merge_into_layers(&mut layers)?;
    /// # Ok::<(), pt_peft::PeftError>(())
    /// ```
    pub fn new<'a>(config: LoraConfig, base: impl Into<Base<'a>>, seed: u64) -> Result<Self> {
        let base = base.into();
        config.validate()?;
        let saved = SavedModules::copies(&config.modules_to_save, &base)?;
        let plan = Plan::new(&config, &base, &saved, Strictness::EveryName)?;
        let copies = Copies::new(&config, &base, &plan, saved)?;
        let mut adapter = Self::assemble(config, &base, plan, copies)?;
        adapter.start(&base, seed)?;
        Ok(adapter)
    }

    /// The adapter with its updates zero.
    fn assemble(mut config: LoraConfig, base: &Base<'_>, plan: Plan<'_>, copies: Copies) -> Result<Self> {
        if config.target_modules.is_all_linear() && !config.layers_to_transform.is_empty() {
            // PEFT takes the numbers of layers beside a list of names only.
            config.target_modules = Modules::Names(plan.short_names());
        }
        let size = base.layers.iter().map(|layer| layer.index + 1).max().unwrap_or(0);
        let mut factors: Vec<Option<Factors>> = (0..size).map(|_| None).collect();
        let Copies { saved, biases, tokens } = copies;
        let mut fan_in_fan_out = false;
        let mut replaced: Vec<String> = saved.iter().map(|saved| saved.name.clone()).collect();
        replaced.extend(biases.named().map(|(name, ..)| name));
        let output = base.output.map(|position| base.layers[position]);
        let mut is_output_changed = false;
        for (layer, Update { rank, scaling }) in plan.layers {
            factors[layer.index] = Some(Factors::zeros(layer, rank, scaling, config.lora_bias, config.use_dora)?);
            fan_in_fan_out |= layer.is_transposed_in_file;
            is_output_changed |= output.is_some_and(|output| output.index == layer.index);
        }
        let embedding = match (plan.embedding, &base.embedding) {
            (Some(Update { rank, scaling }), Some(base)) => {
                Some(EmbeddingFactors::zeros(base, rank, scaling, config.use_dora)?)
            }
            _ => None,
        };
        if let Some(tokens) = &tokens {
            replaced.push(format!("{}.weight", tokens.path));
            is_output_changed |= tokens.tied_output.is_some();
        }
        replaced.extend(output.filter(|_| is_output_changed).map(|layer| format!("{}.weight", layer.path)));
        let state = State::new();
        Ok(Self { config, factors, embedding, tokens, biases, saved, replaced, fan_in_fan_out, state })
    }

    /// Sets the updates to where `init_lora_weights` lets them start.
    fn start(&mut self, base: &Base<'_>, seed: u64) -> Result<()> {
        let init = &self.config.init_lora_weights;
        let start =
            init.start().map_err(|expected| fault(format!("`init_lora_weights` is {init}, expected {expected}")))?;
        let set = |tensor: &Tensor, value: &Tensor| no_grad(|| tensor.shallow_clone().f_copy_(value));
        for layer in &base.layers {
            let Some(factors) = &mut self.factors[layer.index] else { continue };
            let (rank, scaling) = (factors.a.size()[0], factors.scaling);
            let place = Place { path: &layer.path, weight: layer.weight.as_ref(), rank, scaling, seed };
            let started = place.start(start, init)?;
            set(&factors.a, &started.a)?;
            set(&factors.b, &started.b)?;
            if start == Start::Random
                && let Some(bias) = &factors.bias
            {
                set(bias, &place.uniform("lora_B.bias", [1, bias.size()[0]], rank).squeeze())?;
            }
            if start.is_from_weight() {
                factors.part = Some(started);
            }
            if let Some(magnitude) = &factors.magnitude {
                magnitude.start(&layer.weight, &factors.a, &factors.b, scaling)?;
            }
        }
        if let Some(embedding) = &self.embedding {
            // As PyTorch's embeddings start: here B is random, and A zero unless both are to be.
            let rank = embedding.a.size()[0];
            let (path, weight, scaling) = (&embedding.path, embedding.weight.as_ref(), embedding.scaling);
            let place = Place { path, weight, rank, scaling, seed };
            if start == Start::Random {
                set(&embedding.a, &place.normal("lora_embedding_A", [rank, embedding.a.size()[1]], 1.0))?;
            }
            set(&embedding.b, &place.normal("lora_embedding_B", [embedding.b.size()[0], rank], 1.0))?;
            embedding.start_magnitude()?;
        }
        Ok(())
    }

    /// Loads an adapter that PEFT or [`Adapter::save`](crate::Adapter::save) wrote, for a model or linear layers of one's own.
    ///
    /// The tensors must be exactly the adapter's. Two things that PEFT itself writes are passed over: copies of the
    /// base weight (`.base_layer.`), and embeddings that it adds unasked, as long as they equal the model's. An adapter that
    /// was saved with `init_lora_weights` = `pissa` or `olora` has its start computed again from the model, as in PEFT.
    ///
    /// # Errors
    /// [`PeftError::NotAnAdapter`](crate::PeftError::NotAnAdapter) for a folder without an adapter, or with pickled tensors only; those of
    /// [`LoraConfig::from_peft_file`]; [`PeftError::NoMatch`](crate::PeftError::NoMatch); [`PeftError::Keys`](crate::PeftError::Keys) with the difference.
    pub fn load<'a>(folder: &Path, base: impl Into<Base<'a>>) -> Result<Self> {
        let base = base.into();
        files::check_folder(folder)?;
        let config = LoraConfig::from_peft_file(&folder.join(files::CONFIG_FILE))?;
        let saved = SavedModules::copies(&config.modules_to_save, &base)?;
        let plan = Plan::new(&config, &base, &saved, Strictness::AnyName)?;
        let copies = Copies::new(&config, &base, &plan, saved)?;
        let mut shapes = files::shapes_of(&copies.saved);
        shapes.extend(plan.shapes(&config, &base));
        shapes.extend(copies.biases.named().map(|(_, name, value)| (name, value.size())));
        shapes.extend(copies.tokens.iter().map(|tokens| (tokens.name(), tokens.rows.size())));
        // Compared before anything is allocated from the rank that the settings claim.
        let file = files::AdapterFile::open(folder, &base, files::MODULES, &shapes)?;
        let is_from_weight = config.init_lora_weights.start().is_ok_and(Start::is_from_weight);
        let mut adapter = Self::assemble(config, &base, plan, copies)?;
        if is_from_weight {
            adapter.start(&base, 0)?;
        }
        file.read_into(adapter.named().into_iter().map(|(_, entry)| entry))?;
        Ok(adapter)
    }
}
