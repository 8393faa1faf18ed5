"""The Triton kernels of the row contract.

    softmax_kernel      logits of a section            -> its peak, sum of 2^x and sum of x 2^x
    row_kernel          what a row's sections found    -> the row's column of the table, but for
    divergence_kernel   both logits of a section       -> its share of the divergence and of
                                                          mean_ratio, which
    finish_kernel       what a row's sections found    -> adds up
    backward_kernel     the table, and a section       -> its dlogits
    scaled_kernel       a gradient, and one factor     -> their product, in another dtype

A program works on one section of one row, or on one row. The vocabulary alone decides where rows
are cut, so few rows fill a GPU as well as many do, and a row's bits depend neither on its
neighbours nor on their number. There are no atomics. Offsets of rows are 64-bit (row 14,134 of a
151,936-token vocabulary reaches past 2^31 elements).

    parts         (n, 3 * sections)         of the student's softmaxes, or of the teacher's
    divergences   (n, 2 * sections)
    targets       (n,)                      -1: none
    KIND          "none" (no teacher), "forward" (beta = 0), "reverse" (beta = 1) or "mixture"
    scale         log2(e) / temperature: from logits to exponents of 2; one for either side

In the mixture log q and log p carry their weights, log2 (1 - beta) q and log2 beta p: `log_mine`
and `log_theirs` are the logarithms of the weights, and at beta 0 and 1 they are 0.
"""

from kepo_kernels.rows.triton_math import (
    below,
    cap_slope,
    capped,
    first_column,
    half_sum,
    jit,
    merged,
    read,
    scan,
    section_columns,
    tl,
    to_mixture,
    weighted,
)


@jit
def softmax_kernel(
    logits,
    parts,
    stride,
    vocab,
    shared,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    SECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    sections = tl.num_programs(1)
    begin, end = section_columns(section, shared, vocab, SECTION)
    peak, total, moment = scan(logits + row * stride, begin, end, scale, softcap, CAPPED, BLOCK)
    parts += row * (3 * sections) + section
    tl.store(parts, peak)
    tl.store(parts + sections, total)
    tl.store(parts + 2 * sections, moment)


@jit(do_not_specialize=["rows", "sections", "inside"])
def row_kernel(
    logits,
    targets,
    teacher,
    parts,
    teacher_parts,
    table,
    logits_stride,
    teacher_stride,
    rows,
    sections,
    inside,
    shared,
    log_mine,
    log_theirs,
    scale,
    teacher_scale,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    SECTION: tl.constexpr,
    SECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    peak, total, moment = merged(parts, row, sections, sections, scale, SECTIONS)
    log_sum = tl.log2(total)

    target = tl.load(targets + row)
    logit = tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32)
    if CAPPED:
        logit = capped(logit, softcap)
    logprob = tl.where(target >= 0, (logit - peak) * scale - log_sum, 0.0)

    shared_log_sum = log_sum
    teacher_peak = 0.0
    teacher_log_sum = 0.0
    token = 0
    ratio = 0.0
    if KIND != "none":
        shared_peak, shared_total, _ = merged(parts, row, inside, sections, scale, SECTIONS)
        top = (shared_peak - peak) * scale
        shared_log_sum = top + tl.log2(shared_total)
        teacher_peak, teacher_total, _ = merged(
            teacher_parts, row, inside, inside, teacher_scale, SECTIONS
        )
        teacher_log_sum = tl.log2(teacher_total)
    if KIND == "reverse" or KIND == "mixture":
        # The section of the peak, and in it the peak's column.
        lanes = tl.arange(0, SECTIONS)
        peaks = parts + row * (3 * sections) + lanes
        holds = tl.load(peaks, mask=lanes < inside, other=float("nan")) == shared_peak
        section = tl.minimum(tl.min(tl.where(holds, lanes, SECTIONS), 0), inside - 1)
        begin, end = section_columns(section, shared, shared, SECTION)
        token = first_column(logits, shared_peak, begin, end, softcap, CAPPED, BLOCK)
        y = tl.load(teacher + row * teacher_stride + token).to(tl.float32)
        if CAPPED:
            y = capped(y, teacher_softcap)
        log_q = top - shared_log_sum + log_mine
        log_p = (y - teacher_peak) * teacher_scale - teacher_log_sum + log_theirs
        if KIND == "reverse":
            ratio = log_q - log_p
        else:
            ratio = to_mixture(log_p - log_q) - to_mixture(log_theirs - log_mine)

    # In the order of RowStats. `rows` is widened because the table is eleven times as long.
    rows = tl.cast(rows, tl.int64)
    table += row
    tl.store(table, logprob * LN2)
    tl.store(table + rows, 0.0)
    tl.store(table + 2 * rows, (log_sum - moment / total) * LN2)
    tl.store(table + 3 * rows, peak)
    tl.store(table + 4 * rows, log_sum * LN2)
    tl.store(table + 5 * rows, shared_log_sum * LN2)
    tl.store(table + 6 * rows, teacher_peak)
    tl.store(table + 7 * rows, teacher_log_sum * LN2)
    tl.store(table + 8 * rows, tl.cast(token, tl.float32))
    tl.store(table + 9 * rows, ratio * LN2)
    tl.store(table + 10 * rows, 0.0)


@jit(do_not_specialize=["rows"])
def divergence_kernel(
    logits,
    teacher,
    table,
    divergences,
    logits_stride,
    teacher_stride,
    rows,
    shared,
    log_mine,
    log_theirs,
    scale,
    teacher_scale,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    SECTION: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    sections = tl.num_programs(1)
    rows = tl.cast(rows, tl.int64)
    logits += row * logits_stride
    teacher += row * teacher_stride
    table += row
    peak = tl.load(table + 3 * rows)
    log_sum = tl.load(table + 5 * rows) / LN2 - log_mine
    teacher_peak = tl.load(table + 6 * rows)
    teacher_log_sum = tl.load(table + 7 * rows) / LN2 - log_theirs
    token = tl.load(table + 8 * rows).to(tl.int32)
    ratio_of_token = tl.load(table + 9 * rows) / LN2
    if KIND == "mixture":
        # Where p = q; by the same polynomial, so that its errors cancel where p is close to q.
        equal = log_theirs - log_mine
        shape_of_equal = half_sum(tl.exp2(-tl.abs(equal)))

    lanes = tl.zeros((BLOCK,), tl.float32)
    ratios = lanes
    begin, end = section_columns(section, shared, shared, SECTION)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        z = read(logits, column, end, softcap, CAPPED, "")
        y = read(teacher, column, end, teacher_softcap, CAPPED, "")
        if KIND == "mixture":
            log_q = below(z, peak) * scale - log_sum
            log_p = below(y, teacher_peak) * teacher_scale - teacher_log_sum
            rise = log_p - log_q
            shape = shape_of_equal - half_sum(tl.exp2(-tl.abs(rise)))
            log_q_m = shape + (tl.maximum(equal, 0.0) - tl.maximum(rise, 0.0))
            log_p_m = shape + (tl.minimum(rise, 0.0) - tl.minimum(equal, 0.0))
            q = tl.exp2(log_q)
            # (1 - beta) q log q/m + beta p log p/m >= 0 in every column, and an error in log p/q
            # changes it to second order only: near the teacher that leaves it its digits.
            lanes += q * log_q_m + tl.exp2(log_p) * log_p_m
            ratios += q * tl.where(column == token, 0.0, log_q_m - ratio_of_token)
        else:
            # A KL is summed as a log(a/b) - a + b, for the same two reasons.
            log_q = (z - peak) * scale - log_sum
            log_p = (y - teacher_peak) * teacher_scale - teacher_log_sum
            q, p = tl.exp2(log_q), tl.exp2(log_p)
            if KIND == "forward":
                lanes += LN2 * weighted(p, log_p - log_q) - p + q
            else:
                ratio = log_q - log_p
                lanes += LN2 * weighted(q, ratio) - q + p
                ratios += weighted(q, tl.where(column == token, 0.0, ratio - ratio_of_token))
    divergences += row * (2 * sections) + section
    tl.store(divergences, tl.sum(lanes, 0))
    tl.store(divergences + sections, tl.sum(ratios, 0))


@jit(do_not_specialize=["rows", "sections"])
def finish_kernel(divergences, table, rows, sections, unit, ratio_unit, SECTIONS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(rows, tl.int64)
    lanes = tl.arange(0, SECTIONS)
    divergences += row * (2 * sections) + lanes
    divergence = tl.sum(tl.load(divergences, mask=lanes < sections, other=0.0), 0)
    ratio = tl.sum(tl.load(divergences + sections, mask=lanes < sections, other=0.0), 0)
    table += row
    tl.store(table + rows, divergence * unit)
    tl.store(table + 10 * rows, ratio * ratio_unit)


@jit(do_not_specialize=["rows"])
def backward_kernel(
    logits,
    targets,
    teacher,
    table,
    coefficients,
    out,
    logits_stride,
    teacher_stride,
    out_stride,
    rows,
    vocab,
    shared,
    log_mine,
    log_theirs,
    scale,
    teacher_scale,
    inverse_temperature,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    SECTION: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    begin, end = section_columns(section, shared, vocab, SECTION)
    rows = tl.cast(rows, tl.int64)
    logits += row * logits_stride
    out += row * out_stride
    table += row
    peak = tl.load(table + 3 * rows)
    log_sum = tl.load(table + 4 * rows) / LN2
    coefficients += row
    e = tl.load(coefficients + 2 * rows) * inverse_temperature
    target = tl.load(targets + row).to(tl.int32)  # it meets columns, which are
    # Without a target logprob is a constant.
    c = tl.where(target >= 0, tl.load(coefficients) * inverse_temperature, 0.0)
    # c (onehot - q) - e q (log q + entropy) = c onehot - q (known + slope log2 q)
    known = c + e * tl.load(table + 2 * rows)
    slope = e * LN2

    distils = False
    if KIND != "none":
        distils = begin < shared
        teacher += row * teacher_stride
        g = tl.load(coefficients + rows) * inverse_temperature
        shared_log_sum = tl.load(table + 5 * rows) / LN2 - log_mine
        teacher_peak = tl.load(table + 6 * rows)
        teacher_log_sum = tl.load(table + 7 * rows) / LN2 - log_theirs
        token = tl.load(table + 8 * rows).to(tl.int32)
        mean_ratio = tl.load(table + 10 * rows) / LN2
        middle = tl.load(table + 9 * rows) / LN2 + mean_ratio
        if KIND != "forward":
            g *= LN2
        if KIND == "mixture":
            middle += to_mixture(log_theirs - log_mine)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        # These logits are never read again.
        raw = read(logits, column, end, softcap, False, "evict_first")
        z = below(capped(raw, softcap) if CAPPED else raw, peak)
        log_q = z * scale - log_sum
        grad = tl.where(column == target, c, 0.0) - tl.exp2(log_q) * (known + slope * log_q)
        if KIND != "none":  # noqa: SIM102 - a constant, which leaves the code out; the next is a number
            if distils:
                y = read(teacher, column, end, teacher_softcap, CAPPED, "evict_first")
                log_q = z * scale - shared_log_sum
                log_p = below(y, teacher_peak) * teacher_scale - teacher_log_sum
                q = tl.exp2(log_q)
                if KIND == "forward":
                    grad += g * (q - tl.exp2(log_p))
                else:
                    # The ratio of the student's peak is measured from itself: where the student is
                    # sure, its own entry is this alone, and not a difference of equal numbers.
                    if KIND == "mixture":
                        ratio = to_mixture(log_p - log_q) - middle
                    else:
                        ratio = log_q - log_p - middle
                    ratio = tl.where(column == token, -mean_ratio, ratio)
                    grad += g * (q * ratio)
        if CAPPED:
            grad *= cap_slope(raw, softcap)
        tl.store(out + column, grad.to(out.dtype.element_ty), mask=column < end)


@jit
def scaled_kernel(gradient, factor, out, count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = start + tl.arange(0, BLOCK)
    x = tl.load(gradient + lanes, mask=lanes < count, other=0.0, eviction_policy="evict_first")
    tl.store(out + lanes, (x * tl.load(factor)).to(out.dtype.element_ty), mask=lanes < count)
