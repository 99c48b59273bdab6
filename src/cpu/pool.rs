//! Worker threads for the hot path: no allocation, no lock while work is handed out.
//!
//! rayon serves packing at load time, but its cross-thread injection allocates now and then and its wake-ups are not
//! ours to shape, so that forward calls run on this small pool, or on whatever an engine passes as [`Executor`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Runs indexed tasks. Engines with their own pool implement this.
///
/// # Safety
/// [`run`](Executor::run) must call `task` exactly once for every index below `tasks`, must not return (nor unwind)
/// while a call is under way, and must make the calls' writes visible to the caller: kernels hand out disjoint parts
/// of a buffer by index.
pub unsafe trait Executor: Send + Sync {
    /// Threads that take part in [`run`](Self::run), the caller included.
    fn threads(&self) -> usize;

    /// Calls `task(i)` once for every `i < tasks`, in any order and on any thread, and returns when all are done,
    /// with all their writes visible to the caller.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// Runs everything on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleThread;

// SAFETY: a plain loop.
unsafe impl Executor for SingleThread {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// The closure of the running job, with its borrow erased while workers may call it.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: the pointee is `Sync`, and `ThreadPool::run` does not return before every worker has let go of it.
unsafe impl Send for Job {}

struct State {
    job: Option<Job>,
    /// Counts jobs, so that a worker takes each one once.
    epoch: u64,
    /// Workers that have not finished the current job.
    busy: usize,
    panicked: bool,
    stop: bool,
}

struct Shared {
    state: Mutex<State>,
    start: Condvar,
    done: Condvar,
    next: AtomicUsize,
    /// Copies of `State::epoch` and `State::busy` to be polled for a moment before sleeping.
    epoch: AtomicUsize,
    busy: AtomicUsize,
}

/// Polls before a thread sleeps. Short, so that a core shared with others is given back within microseconds.
const SPINS: usize = 2000;

/// Worker threads that sleep between jobs. One job at a time: concurrent callers wait for each other.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

impl ThreadPool {
    /// A pool of `threads` in all (the caller counts as one); 0 means one per available core.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores } else { threads };
        let shared = Arc::new(Shared {
            state: Mutex::new(State { job: None, epoch: 0, busy: 0, panicked: false, stop: false }),
            start: Condvar::new(),
            done: Condvar::new(),
            next: AtomicUsize::new(0),
            epoch: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
        });
        let mut pool = Self { shared, workers: Vec::new(), turn: Mutex::new(()) };
        for i in 1..threads {
            let shared = pool.shared.clone();
            let worker = std::thread::Builder::new().name(format!("moe-oracle-{i}")).spawn(move || work(&shared))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        for _ in 0..SPINS {
            if shared.epoch.load(Ordering::Acquire) as u64 != seen {
                break;
            }
            std::hint::spin_loop();
        }
        let mut state = lock(&shared.state);
        while state.epoch == seen && !state.stop {
            state = shared.start.wait(state).unwrap_or_else(|p| p.into_inner());
        }
        if state.stop {
            return;
        }
        seen = state.epoch;
        let job = state.job;
        drop(state);
        let result = job.map(|job| {
            // SAFETY: `run` keeps the closure borrowed until `busy` is 0, which this worker still counts in.
            let task = unsafe { &*job.task };
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_tasks(shared, job.tasks, task)))
        });
        let mut state = lock(&shared.state);
        state.panicked |= matches!(result, Some(Err(_)));
        state.busy -= 1;
        shared.busy.store(state.busy, Ordering::Release);
        if state.busy == 0 {
            shared.done.notify_one();
        }
    }
}

fn take_tasks(shared: &Shared, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    loop {
        let i = shared.next.fetch_add(1, Ordering::Relaxed);
        if i >= tasks {
            return;
        }
        task(i);
    }
}

// SAFETY: indices come from one counter, and `run` waits until no worker is busy, also when a task panics.
unsafe impl Executor for ThreadPool {
    fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || tasks <= 1 {
            return SingleThread.run(tasks, task);
        }
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the wait below keeps `task` borrowed until no worker can call it.
        let erased = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(task)
        };
        {
            let mut state = lock(&shared.state);
            state.job = Some(Job { task: erased, tasks });
            state.epoch += 1;
            state.busy = self.workers.len();
            shared.busy.store(state.busy, Ordering::Relaxed);
            shared.next.store(0, Ordering::Relaxed);
            shared.epoch.store(state.epoch as usize, Ordering::Release);
            shared.start.notify_all();
        }
        let mine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_tasks(shared, tasks, task)));
        for _ in 0..SPINS {
            if shared.busy.load(Ordering::Acquire) == 0 {
                break;
            }
            std::hint::spin_loop();
        }
        let mut state = lock(&shared.state);
        while state.busy > 0 {
            state = shared.done.wait(state).unwrap_or_else(|p| p.into_inner());
        }
        state.job = None;
        let panicked = std::mem::take(&mut state.panicked);
        drop(state);
        if let Err(payload) = mine {
            std::panic::resume_unwind(payload);
        }
        assert!(!panicked, "a task panicked on a worker thread");
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.start.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches panics of tasks, so that joining can only fail if the thread was killed.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_each_of_many_jobs() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 7, 100] {
                let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    hits[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }
}
