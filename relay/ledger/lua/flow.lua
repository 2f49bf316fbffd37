-- Adds what was counted since the last time, and notes how far that went, both or neither.
-- ARGV: the note's key, the note, how long it is kept; then for each hash: its key, how long it is kept,
-- the number of sums, field and increment of each, the number of maxima, field and value of each.
redis.call('SET', ARGV[1], ARGV[2], 'EX', ARGV[3])
local i = 4
while i <= #ARGV do
    local key, seconds, sums = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
    i = i + 3
    for _ = 1, sums do
        redis.call('HINCRBY', key, ARGV[i], ARGV[i + 1])
        i = i + 2
    end
    local maxima = tonumber(ARGV[i])
    i = i + 1
    for _ = 1, maxima do
        if tonumber(ARGV[i + 1]) > (tonumber(redis.call('HGET', key, ARGV[i])) or 0) then
            redis.call('HSET', key, ARGV[i], ARGV[i + 1])
        end
        i = i + 2
    end
    redis.call('EXPIRE', key, seconds)
end
return 1
