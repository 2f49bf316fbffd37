-- ARGV: from, to, 'pending' or 'failed', then for each copy: id, its state as it was read ('' for none), its state
-- there ('' for none, '-' if nothing of it is owed there). A copy is moved only if it has not changed since, is not
-- leased, and is neither pending nor failed there. Returns 1 for each that is moved or gone, else 0.
local from, to, list = ARGV[1], ARGV[2], ARGV[3]
local states = list == 'pending' and 'smtpdup:own:' or 'smtpdup:failure:'
local now = clock()
local names, whole = destinations()
local result = {}
for i = 4, #ARGV, 3 do
  local id, before, after = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local score = redis.call('ZSCORE', 'smtpdup:' .. list .. ':' .. from, id)
  local lease = list == 'pending' and redis.call('ZSCORE', 'smtpdup:busy:' .. from, id)
  local done = 0
  if not score then
    done = 1
  elseif (redis.call('HGET', states .. from, id) or '') == before
    and not (lease and tonumber(lease) > now)
    and not (after ~= '-' and (redis.call('ZSCORE', 'smtpdup:pending:' .. to, id) or redis.call('ZSCORE', 'smtpdup:failed:' .. to, id)))
  then
    redis.call('ZREM', 'smtpdup:' .. list .. ':' .. from, id)
    turned(from, {before}, {}, 'moved', 0)
    redis.call('HDEL', states .. from, id)
    if list == 'pending' then
      redis.call('ZREM', 'smtpdup:busy:' .. from, id)
      redis.call('HDEL', 'smtpdup:holders:' .. from, id)
    end
    if after ~= '-' then
      redis.call('SADD', 'smtpdup:lists', to)
      redis.call('ZADD', 'smtpdup:' .. list .. ':' .. to, score, id)
      if after ~= '' then
        redis.call('HSET', states .. to, id, after)
      end
    elseif not is_listed(names, id) then
      forget_body(id, whole)
    end
    done = 1
  end
  result[#result + 1] = done
end
return result
