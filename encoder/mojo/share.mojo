"""Tasks for all of MAX's threads, and what they may read."""

from max.algorithm import sync_parallelize
from max.runtime.asyncrt import parallelism_level
from std.atomic import Atomic
from std.utils.index import IndexList

comptime Task = ImplicitlyCopyable & RegisterPassable & def(Int) -> None


@always_inline
def share[TaskType: Task](task: TaskType, count: Int):
    """Do task(0) to task(count - 1); whoever is done takes the next.

    `sync_parallelize` deals tasks out beforehand, and a processor that others use as well is waited
    for.
    """
    var next = Atomic[Int](0)

    def worker(_number: Int) {mut next, imm}:
        var i = next.fetch_add(1)
        while i < count:
            task(i)
            i = next.fetch_add(1)

    sync_parallelize(worker, min(count, parallelism_level(None)))


def require_dense(name: String, strides: IndexList, shape: IndexList) raises:
    """Raise where a tensor is a view whose rows do not lie one behind the other."""
    var expected = 1
    for i in range(shape.size - 1, -1, -1):
        if strides[i] != expected and shape[i] != 1:
            raise Error("max_whisper: ", name, " is a strided view, expected a dense tensor")
        expected *= shape[i]
