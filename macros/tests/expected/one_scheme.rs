const _: &[u8] = include_bytes!("table.toml");
///The oracle of the `int8` scheme: zero-sized, its quant keys in `W` (weights) and `A` (activations).
#[derive(Clone, Copy, Debug, Default)]
pub struct Int8<const W: u64, const A: u64>;
///per channel x per token
pub type Int8Channel = Int8<
    { INT8_STATIC_CHANNEL_SYM.bits() },
    { INT8_DYNAMIC_TOKEN_SYM.bits() },
>;
///weights only
pub type Int8ChannelWeightOnly = Int8<
    { INT8_STATIC_CHANNEL_SYM.bits() },
    { UNQUANTIZED },
>;
///Backends of the `int8` oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Int8Backend {
    ///`cuda_mma` on cuda
    CudaMma,
    ///`cpu_reference` on cpu
    CpuReference,
}
impl BackendEnum for Int8Backend {
    const ALL: &'static [Self] = &[Int8Backend::CudaMma, Int8Backend::CpuReference];
    fn name(self) -> &'static str {
        match self {
            Int8Backend::CudaMma => "cuda_mma",
            Int8Backend::CpuReference => "cpu_reference",
        }
    }
}
///The `cuda_mma` kernel of the `int8` scheme: zero-sized, one type per key pair.
#[derive(Clone, Copy, Debug, Default)]
pub struct Int8CudaMma<const W: u64, const A: u64>;
impl<const W: u64, const A: u64> Int8CudaMma<W, A> {
    /// What the table says of it.
    pub const INFO: &'static KernelInfo = &KernelInfo {
        name: "cuda_mma",
        device: Device::Cuda {
            min: 80u16,
            max: 65535u16,
        },
        numerics: Numerics::WeightOnly,
        experts: ExpertsKind::Mma,
        by_name_only: false,
        pairs: &[(INT8_STATIC_CHANNEL_SYM.bits(), UNQUANTIZED)],
        activations: named(&["silu", "gelu"], &crate::config::Activation::NAMES),
        formats: named(&["standard"], &crate::config::ActivationFormat::NAMES),
        inputs: named(&["bf16", "f16"], &crate::config::InputType::NAMES),
    };
}
///The `cpu_reference` kernel of the `int8` scheme: zero-sized, one type per key pair.
#[derive(Clone, Copy, Debug, Default)]
pub struct Int8CpuReference<const W: u64, const A: u64>;
impl<const W: u64, const A: u64> Int8CpuReference<W, A> {
    /// What the table says of it.
    pub const INFO: &'static KernelInfo = &KernelInfo {
        name: "cpu_reference",
        device: Device::Cpu,
        numerics: Numerics::AsKeyed,
        experts: ExpertsKind::Reference,
        by_name_only: false,
        pairs: &[
            (INT8_STATIC_CHANNEL_SYM.bits(), INT8_DYNAMIC_TOKEN_SYM.bits()),
            (INT8_STATIC_CHANNEL_SYM.bits(), UNQUANTIZED),
        ],
        activations: named(
            &crate::config::Activation::NAMES,
            &crate::config::Activation::NAMES,
        ),
        formats: named(
            &crate::config::ActivationFormat::NAMES,
            &crate::config::ActivationFormat::NAMES,
        ),
        inputs: named(&["bf16", "f16"], &crate::config::InputType::NAMES),
    };
}
impl<const W: u64, const A: u64> Int8<W, A> {
    /// The legal pairs of this scheme.
    pub const PAIRS: &'static [(u64, u64)] = &[
        (INT8_STATIC_CHANNEL_SYM.bits(), INT8_DYNAMIC_TOKEN_SYM.bits()),
        (INT8_STATIC_CHANNEL_SYM.bits(), UNQUANTIZED),
    ];
    /// The names that [`map_backend`](Self::map) takes.
    pub const NAMES: &'static str = "auto, cuda_mma, cpu_reference, emulation, humming";
    /// Fails the build for an illegal key pair; called by every entry point.
    const fn legal() {
        const {
            assert!(
                pair_in(Self::PAIRS, W, A), concat!("the `", "int8",
                "` oracle has no kernel for this pair of weight and activation keys: use one of its aliases, or see its PAIRS")
            )
        }
    }
    /// `MoeKernelOracle::priority_backends`, in const context.
    pub const fn priority(platform: &Platform) -> &'static [Int8Backend] {
        Self::legal();
        match platform {
            Platform::Cuda(_) => &[Int8Backend::CudaMma, Int8Backend::CpuReference],
            _ => &[Int8Backend::CpuReference, Int8Backend::CudaMma],
        }
    }
    /// `MoeKernelOracle::map_backend`, in const context. `Ok(None)`: the name leaves the choice to us.
    pub const fn map(name: MoeBackend) -> Result<Option<Int8Backend>, Unsupported> {
        Self::legal();
        match name {
            MoeBackend::Auto | MoeBackend::Humming => Ok(None),
            MoeBackend::Emulation => Ok(Some(Int8Backend::CpuReference)),
            MoeBackend::CudaMma => Ok(Some(Int8Backend::CudaMma)),
            MoeBackend::CpuReference => Ok(Some(Int8Backend::CpuReference)),
            MoeBackend::Aiter => Err(Unsupported::NameOfOtherHardware(name)),
            #[allow(unreachable_patterns)]
            _ => {
                Err(Unsupported::UnknownName {
                    name,
                    works: Self::NAMES,
                })
            }
        }
    }
    /// What a name means on a platform: some name another backend on NVIDIA GPUs.
    const fn map_on(
        name: MoeBackend,
        platform: &Platform,
    ) -> Result<Option<Int8Backend>, Unsupported> {
        match (name, *platform) {
            _ => Self::map(name),
        }
    }
    /// The kernel behind a backend.
    pub const fn kernel(backend: Int8Backend) -> &'static KernelInfo {
        Self::legal();
        match backend {
            Int8Backend::CudaMma => <Int8CudaMma<W, A>>::INFO,
            Int8Backend::CpuReference => <Int8CpuReference<W, A>>::INFO,
        }
    }
    /// `MoeKernelOracle::select_backend`, in const context.
    pub const fn select(
        config: &MoeConfig,
        platform: &Platform,
        inputs: &SelectInputs,
    ) -> Result<Selection<Int8Backend>, SelectError> {
        let order = Self::priority(platform);
        let wanted = match Self::map_on(inputs.backend, platform) {
            Ok(wanted) => wanted,
            Err(why) => return Err(SelectError::of_name(Scheme::Int8, why)),
        };
        let mut error = SelectError::none(Scheme::Int8);
        let mut i = 0;
        while i < order.len() {
            let backend = order[i];
            i += 1;
            let info = Self::kernel(backend);
            let passed_over = match wanted {
                Some(w) => w as u8 != backend as u8,
                None => info.by_name_only,
            };
            if passed_over {
                continue;
            }
            match supports(info, config, platform, inputs, W, A) {
                Ok(()) => return Ok(Selection { backend, kernel: info }),
                Err(why) => error = error.with(info.name, why),
            }
        }
        Err(error)
    }
}
impl<const W: u64, const A: u64> MoeKernelOracle for Int8<W, A> {
    type Backend = Int8Backend;
    type Config = SelectInputs;
    const SCHEME: Scheme = Scheme::Int8;
    const WEIGHT_KEY: Option<QuantKey> = QuantKey::from_bits(W);
    const ACTIVATION_KEY: Option<QuantKey> = QuantKey::from_bits(A);
    fn priority_backends(_: &MoeConfig, platform: &Platform) -> &'static [Int8Backend] {
        Self::priority(platform)
    }
    fn kernel(backend: Int8Backend) -> &'static KernelInfo {
        Int8::<W, A>::kernel(backend)
    }
    fn map_backend(name: MoeBackend) -> Result<Option<Int8Backend>, SelectError> {
        Self::map(name).map_err(|why| SelectError::of_name(Scheme::Int8, why))
    }
    fn select_backend(
        config: &MoeConfig,
        platform: &Platform,
        inputs: &SelectInputs,
    ) -> Result<Selection<Int8Backend>, SelectError> {
        Self::select(config, platform, inputs)
    }
}
/// The names that a user may give a backend. Every scheme knows some of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MoeBackend {
    /// The best that the platform supports.
    #[default]
    Auto,
    ///`aiter`
    Aiter,
    ///`cpu_reference`
    CpuReference,
    ///`cuda_mma`
    CudaMma,
    ///`emulation`
    Emulation,
    ///`humming`
    Humming,
}
impl MoeBackend {
    /// Every name.
    pub const ALL: &'static [MoeBackend] = &[
        MoeBackend::Auto,
        MoeBackend::Aiter,
        MoeBackend::CpuReference,
        MoeBackend::CudaMma,
        MoeBackend::Emulation,
        MoeBackend::Humming,
    ];
    /// As users write it.
    pub const fn name(self) -> &'static str {
        match self {
            MoeBackend::Auto => "auto",
            MoeBackend::Aiter => "aiter",
            MoeBackend::CpuReference => "cpu_reference",
            MoeBackend::CudaMma => "cuda_mma",
            MoeBackend::Emulation => "emulation",
            MoeBackend::Humming => "humming",
        }
    }
}
/// Every legal (scheme, weight key, activation key), each with its monomorphised oracle.
pub static ORACLES: &[DynOracle] = &[
    DynOracle {
        scheme: Scheme::Int8,
        alias: "Int8Channel",
        weight: INT8_STATIC_CHANNEL_SYM.bits(),
        activation: INT8_DYNAMIC_TOKEN_SYM.bits(),
        vtable: Vtable::of::<Int8Channel>(),
    },
    DynOracle {
        scheme: Scheme::Int8,
        alias: "Int8ChannelWeightOnly",
        weight: INT8_STATIC_CHANNEL_SYM.bits(),
        activation: UNQUANTIZED,
        vtable: Vtable::of::<Int8ChannelWeightOnly>(),
    },
];
/// Every (scheme, backend) row of the table.
pub static SUPPORT: &[(Scheme, &KernelInfo)] = &[
    (Scheme::Int8, <Int8CudaMma<0, 0>>::INFO),
    (Scheme::Int8, <Int8CpuReference<0, 0>>::INFO),
];
